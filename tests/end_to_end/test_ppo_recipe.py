"""beta1 = 0 is PPO: bitwise the run of the PPO recipe, and the DPO model is never loaded."""

from __future__ import annotations

import runpy

import pytest
from loop_helpers import ROOT, small_run
from safetensors.torch import load_file
from test_kill_resume import figures


@pytest.fixture(scope="module")
def runs(one_rank, tiny, tmp_path_factory):
    """Output folders of the PPO recipe's settings and of RTO's with beta1 = 0 and a DPO model that is not there."""
    import dataclasses
    import sys

    from rto_fast import trainer

    sys.path.insert(0, str(ROOT / "recipes"))
    folder = tmp_path_factory.mktemp("ppo")
    found = {}
    for name, recipe, change in (
        ("ppo", "ppo_llama3.py", {}),
        ("rto", "rto_llama3.py", {"beta1": 0.0, "dpo_model": "nowhere/at/all", "dpo_clip": 0.02}),
    ):
        defaults = runpy.run_path(str(ROOT / "recipes" / recipe))["DEFAULTS"]
        settings = {k: v for k, v in small_run(tiny, folder / name).items() if k != "dpo_model"}
        trainer.train(dataclasses.replace(defaults, **(settings | {"prompt_key": "prompt"} | change)))
        found[name] = folder / name
    sys.path.remove(str(ROOT / "recipes"))
    return found


@pytest.mark.parametrize("model", ["policy", "critic"])
def test_weights_are_equal_bit_for_bit(runs, model):
    ppo, rto = (load_file(runs[name] / model / "model.safetensors") for name in ("ppo", "rto"))
    assert ppo.keys() == rto.keys()
    assert all((ppo[name] == rto[name]).all() for name in ppo)


def test_metrics_are_equal(runs):
    ppo, rto = (figures(runs[name] / "metrics.jsonl") for name in ("ppo", "rto"))
    assert ppo == rto
    assert all(row["reward/dpo"] == 0 for row in ppo)


def test_the_token_reward_changes_the_run(runs, tiny, tmp_path):
    """The comparison above could fail: with beta1 > 0 the same settings give other weights."""
    from rto_fast import trainer
    from rto_fast.config import RTOConfig

    trainer.train(RTOConfig(**small_run(tiny, tmp_path / "on", prompt_key="prompt")))
    on, off = (load_file(folder / "policy" / "model.safetensors") for folder in (tmp_path / "on", runs["ppo"]))
    assert any((on[name] != off[name]).any() for name in on)


def test_rlvr_without_a_source_pays_no_token_rewards(one_rank, tiny, tmp_path):
    """Bit for bit the run with beta1 0, and the one with beta1 0 and a DPO model that is not there."""
    from rto_fast import trainer
    from rto_fast.config import RLVRConfig

    small = {
        "advantage": "rloo", "responses_per_prompt": 2, "rollout_batch": 4, "iterations": 1, "prompt_key": "prompt",
        "reward_fn": (), "policy_lr": 1e-3, "dpo_model": (),
    }  # fmt: skip
    found = {}
    for name, change in (("default", {}), ("off", {"beta1": 0.0}), ("unread", {"beta1": 0.0, "dpo_model": "no/where"})):
        trainer.train(RLVRConfig(**small_run(tiny, tmp_path / name, **small | change)))
        found[name] = (
            load_file(tmp_path / name / "policy" / "model.safetensors"),
            figures(tmp_path / name / "metrics.jsonl"),
        )
    weights, rows = found["default"]
    for others, theirs in (found["off"], found["unread"]):
        assert all((weights[name] == others[name]).all() for name in weights)
        assert rows == theirs
