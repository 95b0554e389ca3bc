"""Distillation on a pretrained story model: its own samples against the teacher's, at equally many tokens."""

from __future__ import annotations

import json

import pytest
from recipe_helpers import SHARED, needs_shared

from rto_fast.config import DistillConfig, SFTConfig
from rto_fast.generate import GenerateConfig, generate
from rto_fast.supervised.sft import train_sft
from rto_fast.trainer import train

pytestmark = [needs_shared, pytest.mark.slow]
MODEL, DATA = str(SHARED / "models/stories1m"), SHARED / "data/story_preferences.jsonl"
COMMON = {
    "dtype": "fp32", "data_workers": 1, "data_cache": False, "gradient_checkpointing": False, "micro_tokens": 8192,
    "save_minutes": 0.0,
}  # fmt: skip
SFT = COMMON | {"batch": 32, "eval_split": "", "max_length": 256, "invalid_rows": "skip_empty"}
RESPONSES, ITERATIONS, TOKENS = 64, 8, 48


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_own_samples_teach_more_than_the_teachers(one_rank, tmp_path):
    """KL(student || teacher) on prompts that neither saw, the better of two rates of SFT."""
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    prompts = [{"prompt": p} for p in dict.fromkeys(row["prompt"] for row in rows)]
    held, seen = write(tmp_path / "held.jsonl", prompts[-128:]), prompts[: RESPONSES * ITERATIONS]
    chosen = write(tmp_path / "chosen.jsonl", [{"prompt": r["prompt"], "response": r["chosen"]} for r in rows[:600]])
    teacher = str(train_sft(SFTConfig(**SFT, model=MODEL, data=chosen, lr=1e-3, output_dir=str(tmp_path / "teacher"))))
    settings = COMMON | {
        "teacher": teacher, "max_prompt_length": 64, "max_response_length": TOKENS, "report": False,
        "sync_proof": False, "rollout_engine": "transformers", "score_tokens": 8192,
    }  # fmt: skip

    def gap(policy, name):
        config = settings | {"policy": str(policy), "data": held, "output_dir": str(tmp_path / name), "iterations": 1}
        train(DistillConfig(**config, rollout_batch=128, train_batch=128, policy_lr=1e-12, seed=7))
        return json.loads((tmp_path / name / "metrics.jsonl").read_text())["kl/logratio"]

    start = gap(MODEL, "start")
    data = write(tmp_path / "seen.jsonl", seen)
    config = settings | {"policy": MODEL, "data": data, "iterations": ITERATIONS, "output_dir": str(tmp_path / "own")}
    train(DistillConfig(**config, rollout_batch=RESPONSES, train_batch=16, policy_lr=3e-4))
    own = gap(tmp_path / "own" / "policy", "after_own")

    samples = tmp_path / "samples.jsonl"
    generate(GenerateConfig(
        model=teacher, data=data, output=str(samples), max_response_length=TOKENS, dtype="fp32",
        rollout_engine="transformers", rollout_tokens=16384,
    ))  # fmt: skip
    taught = write(tmp_path / "taught.jsonl", [
        {"prompt": r["prompt"], "response": r["response"]} for r in map(json.loads, samples.read_text().splitlines())
    ])  # fmt: skip
    gaps = []
    for lr in (3e-5, 1e-4):
        folder = train_sft(SFTConfig(**SFT, model=MODEL, data=taught, lr=lr, output_dir=str(tmp_path / f"sft{lr}")))
        gaps.append(gap(folder, f"after_sft{lr}"))
    print(f"KL to the teacher: {start:.2f} at the start, {own:.2f} by own samples, {gaps} by the teacher's")
    assert own < 0.9 * start
    assert own < min(gaps)
