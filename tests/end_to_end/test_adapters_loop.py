"""RTO with adapters: one base for all models, the first KL exactly 0, resumed bit for bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from loop_helpers import ROOT, small_run
from safetensors.torch import load_file

from rto_fast import trainer
from rto_fast.config import DPOConfig, RMConfig, RTOConfig
from rto_fast.supervised.dpo import train_dpo
from rto_fast.supervised.reward_model import train_rm

pytest.importorskip("peft")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory, one_rank):
    """Folders of an RTO run on adapters of a DPO and a reward model, of the same from its first checkpoint, and with a
    critic on a base of its own; the first one's Run beside them."""
    root = tmp_path_factory.mktemp("adapters")
    common = {
        "model": tiny.policy, "data": tiny.pairs, "dtype": "fp32", "batch": 32, "max_length": 64, "data_cache": False,
        "data_workers": 1, "gradient_checkpointing": False, "lora_rank": 4, "lora_lr": 1e-2,
    }  # fmt: skip
    dpo = train_dpo(DPOConfig(**common, output_dir=str(root / "dpo")))
    reward = train_rm(RMConfig(**common, output_dir=str(root / "rm")))
    found: dict = {}

    def run(name: str, **settings):
        asked = small_run(tiny, root / name, dpo_model=str(dpo), reward_model=(str(reward),), lora_rank=4,
                          lora_policy_lr=1e-2, rollout_engine="transformers", save_every=1, keep_last=9)  # fmt: skip
        found[name] = root / name
        return trainer.train(RTOConfig(**asked | settings))

    found["Run"] = run("whole")
    (root / "resumed" / "checkpoints").mkdir(parents=True)
    shutil.copytree(root / "whole/checkpoints/step-00000001", root / "resumed/checkpoints/step-00000001")
    run("resumed", resume="auto")
    run("own", lora_critic="own")
    return found


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def learnt(row: dict) -> dict:
    return {k: v for k, v in row.items() if k.startswith(("policy/", "critic/", "kl/", "reward/", "value"))}


def test_the_first_kl_is_zero_exactly(runs):
    first, second = rows(runs["whole"])
    assert first["kl/response"] == 0.0
    assert first["kl/k3"] == 0.0
    assert second["kl/response"] != 0.0


def test_all_models_stand_on_one_base(tiny, runs):
    """After two iterations, a proof of the sampler and several updates, not a bit of it has moved."""
    run = runs["Run"]
    base = load_file(Path(tiny.policy) / "model.safetensors")
    frozen = {name.replace(".base_layer", ""): p for name, p in run.policy.model.lm.named_parameters()
              if not p.requires_grad}  # fmt: skip
    assert all(torch.equal(p, base[name]) for name, p in frozen.items())
    shared = {p.data_ptr() for name, p in frozen.items() if not name.startswith("lm_head")}
    scorers = run.scorers
    reward = scorers.rewards[0].model.module
    for model in (scorers.reference.module, scorers.dpo.module, reward, run.critic.model):
        assert {p.data_ptr() for p in model.parameters()} >= shared
    trained = [{p.data_ptr() for p in e.model.parameters() if p.requires_grad} for e in (run.policy, run.critic)]
    assert not trained[0] & trained[1]


def test_it_resumes_bit_for_bit(tiny, runs):
    """Exports are adapters; a checkpoint is smaller than the base with its optimiser."""
    for name in ("policy", "critic"):
        ours, theirs = (load_file(runs[r] / name / "adapter_model.safetensors") for r in ("resumed", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert not (runs["whole"] / name / "config.json").exists()
    assert learnt(rows(runs["resumed"])[-1]) == learnt(rows(runs["whole"])[-1])


def test_a_critic_on_a_base_of_its_own_learns_the_same(runs):
    for ours, theirs in zip(rows(runs["own"]), rows(runs["whole"]), strict=True):
        wanted = learnt(theirs)
        assert len(wanted) > 5
        for name, value in learnt(ours).items():
            assert value == pytest.approx(wanted[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_ranks_do_what_one_does(runs, tmp_path, launch, zero_stage):
    """The first iteration."""
    settings = dataclasses.asdict(runs["Run"].config) | {
        "output_dir": str(tmp_path / "run"), "zero_stage": zero_stage, "save_every": 0, "report_samples": 0,
    }  # fmt: skip
    result = launch([ROOT / "tests" / "vllm_worker.py", json.dumps([settings])], ranks=2)
    assert result.returncode == 0, result.output
    ours, alone = learnt(rows(tmp_path / "run")[0]), learnt(rows(runs["whole"])[0])
    assert ours.keys() == alone.keys()
    for name, value in alone.items():
        assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_zero_3_takes_one_base_apart(runs, tmp_path, launch, ranks):
    """A rank has its part of the base and of each adapter, once, and learns what one rank under ZeRO-2 does."""
    settings = dataclasses.asdict(runs["Run"].config) | {
        "output_dir": str(tmp_path / "run"), "zero_stage": 3, "save_every": 0, "report_samples": 0,
    }  # fmt: skip
    result = launch([ROOT / "tests" / "one_base_worker.py", json.dumps(settings), tmp_path / "held"], ranks=ranks)
    assert result.returncode == 0, result.output
    folders = {"frozen": (settings["dpo_model"][0], settings["reward_model"][0]),
               "trained": (runs["whole"] / "policy", runs["whole"] / "critic")}  # fmt: skip
    for rank in range(ranks):
        held = json.loads((tmp_path / f"held-{rank}.json").read_text())
        assert held["shared"] == {"critic": held["tensors"] - 1, "reference": held["tensors"], "dpo": held["tensors"],
                                  "reward": held["tensors"] - 1}, "all but the lm_head"  # fmt: skip
        for kind, places in folders.items():
            tensors = [t for f in places for t in load_file(Path(f) / "adapter_model.safetensors").values()]
            whole = sum(t.numel() for t in tensors) + (held["base"] if kind == "frozen" else 0)
            odd = len(tensors) + (held["tensors"] if kind == "frozen" else 0)  # a tensor's last part may be filled up
            assert held[f"{kind} whole"] == whole
            assert whole / ranks <= held[f"{kind} parts"] <= whole / ranks + odd
        assert not held["gathered"]
    for ours, alone in zip(rows(tmp_path / "run"), rows(runs["whole"]), strict=True):
        assert learnt(ours).keys() == learnt(alone).keys()
        for name, value in learnt(alone).items():
            assert learnt(ours)[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_a_finished_run_of_adapters_is_not_begun_again(tiny, runs):
    from rto_fast.errors import ConfigError

    shutil.rmtree(runs["own"] / "checkpoints")
    with pytest.raises(ConfigError, match="holds a finished run"):
        trainer.train(RTOConfig(**small_run(tiny, runs["own"], lora_rank=4, resume="auto")))
