"""The recipes on real models and data, two ranks: each stage takes the last one's folder.

RTO under ZeRO-3 is started by DeepSpeed's launcher; the others' ranks start warm, with the same variables and flags.
"""

from __future__ import annotations

import json

import pytest
from launches import Launch
from recipe_helpers import SHARED, flags_of, needs_shared, run_deepspeed, run_recipe

pytestmark = [needs_shared, pytest.mark.slow]
MODEL, STORIES, MESSAGES = (
    str(SHARED / p) for p in ("models/stories260k", "data/story_preferences.jsonl", "data/preferences.jsonl")
)
SHORT = {"dtype": "fp32", "data_split": "train", "lr": 1e-3, "batch": 32, "micro_tokens": 4096}


def figures(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Reward model and DPO model (ZeRO-2) from a few hundred story pairs, two ranks."""
    root = tmp_path_factory.mktemp("real")
    for recipe, name, lr in (("rm_llama3.py", "rm", 1e-3), ("dpo_llama3.py", "dpo", 2e-4)):
        settings = SHORT | {
            "lr": lr,
            "model": MODEL, "data": STORIES, "eval_split": "", "output_dir": root / name, "max_rows": 256,
            "max_length": 256, "eval_fraction": 0.125,
        }  # fmt: skip
        result = Launch([f"recipes/{recipe}", *flags_of(settings)], ranks=2, log=root / f"{name}.log").wait()
        assert result.returncode == 0, result.output
    return root


def test_reward_model_carries_its_statistics(chain):
    config = json.loads((chain / "rm" / "model" / "config.json").read_text())
    last = figures(chain / "rm")[-1]
    assert (config["mean"], config["std"]) == (last["eval/score_mean"], last["eval/score_std"])
    assert config["std"] > 0


def test_dpo_learns(chain):
    rows = figures(chain / "dpo")
    assert rows[0]["train/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert rows[-1]["eval/loss"] < rows[0]["train/loss"]


@pytest.mark.parametrize("stage", [2, 3])
def test_rto_on_two_ranks(chain, tmp_path, launch, stage):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = {
        "policy": MODEL, "dpo_model": chain / "dpo" / "model", "reward_model": chain / "rm" / "model",
        "data": STORIES, "data_split": "train", "prompt_key": "prompt", "output_dir": tmp_path / "rto",
        "dtype": "fp32", "max_rows": 64, "rollout_batch": 16, "train_batch": 8, "iterations": 2,
        "max_prompt_length": 64, "max_response_length": 24, "policy_lr": 1e-4, "critic_lr": 1e-4, "zero_stage": stage,
    }  # fmt: skip
    flags = flags_of(settings)
    result = run_deepspeed("rto_llama3.py", flags) if stage == 3 else launch(["recipes/rto_llama3.py", *flags], ranks=2)
    assert result.returncode == 0, result.output
    assert "critic: starts from the reward model" in result.output
    rows = figures(tmp_path / "rto")
    assert len(rows) == 2
    assert rows[0]["kl/response"] == pytest.approx(0, abs=1e-3)
    assert rows[0]["sampler/logp_diff_max"] < 1e-4
    assert rows[0]["reward/dpo"] != 0
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "rto" / "policy")
    before = AutoModelForCausalLM.from_pretrained(MODEL)
    ids = AutoTokenizer.from_pretrained(tmp_path / "rto" / "policy")("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        assert not torch.equal(policy(ids).logits, before(ids).logits)


def test_messages_that_do_not_fit_are_skipped_and_counted(tmp_path, launch):
    """The model's context is 512 tokens; most of these pairs are longer."""
    settings = SHORT | {
        "model": MODEL, "data": MESSAGES, "eval_split": "", "output_dir": tmp_path / "dpo", "max_length": 512,
        "overlong": "skip", "batch": 64, "micro_tokens": 8192, "epochs": 0.25,
    }  # fmt: skip
    result = launch(["recipes/dpo_llama3.py", *flags_of(settings)], ranks=2)
    assert result.returncode == 0, result.output
    assert "1,200 rows, 240 kept, 960 skipped" in result.output
    assert figures(tmp_path / "dpo")[-1]["eval/loss"] > 0


def test_a_length_beyond_the_models_positions_is_refused(tmp_path, one_rank, monkeypatch, capsys):
    settings = SHORT | {"model": MODEL, "data": MESSAGES, "output_dir": tmp_path / "dpo", "max_length": 513}
    assert run_recipe("dpo_llama3.py", flags_of(settings), monkeypatch) == 2
    assert capsys.readouterr().err.count("error: max_length") == 1
    assert not (tmp_path / "dpo").exists()
