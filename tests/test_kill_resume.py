"""SIGKILL at any moment, then `--resume auto`: the outcome is that of the run that was never killed, bit for bit."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from loop_helpers import small_run
from recipe_helpers import flags_of
from safetensors.torch import load_file

KILLS = 5
ITERATIONS = 8
SETTINGS = {
    "iterations": ITERATIONS, "save_every": 1, "keep_last": 2, "resume": "auto", "ppo_epochs": 2, "ema_decay": 0.9,
    "kl_target": 0.02, "kl_horizon": 50, "policy_lr": 1e-3, "critic_lr": 1e-3, "report_samples": 4,
}  # fmt: skip
MEASURED = ("time/", "rate/", "memory/", "run/")
"""Metrics that two equal runs do not share."""


def rows(path: Path) -> list[dict]:
    """Whole lines of a JSONL file that may be in the middle of being written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]


def figures(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows(path)]


def kill_when(running, ready, delay_s: float) -> bool:
    """SIGKILLs the launch `delay_s` after `ready()`; False when it ended before."""
    while not ready():
        if all(p.poll() is not None for p in running.processes):
            return False
        time.sleep(0.01)
    time.sleep(delay_s)
    alive = any(p.poll() is None for p in running.processes)
    running.kill()
    return alive


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not (ours[name] == theirs[name]).all()]
    assert not different, f"{a.name}: {len(different)} of {len(ours)} tensors differ, {different[:3]}"


def test_rto_killed_five_times(tiny, launch, tmp_path):
    """Policy, critic and average, metrics and samples, with adaptive KL and two PPO epochs."""

    def command(folder: Path) -> list[str]:
        settings = small_run(tiny, folder, **SETTINGS)
        settings = {k: str(v) if isinstance(v, bool) else v for k, v in settings.items()}
        return ["recipes/rto_llama3.py", "--prompt-key", "prompt", *flags_of(settings)]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = launch(command(whole))
    assert done.returncode == 0, done.output

    rng, killed_at = random.Random(20), []
    for k in range(1, KILLS + 1):
        running = launch.start(command(killed))
        # A moment after the k-th row: in the middle of a rollout, an update, a checkpoint or a log line.
        if kill_when(running, lambda k=k: len(rows(killed / "metrics.jsonl")) >= k, rng.uniform(0, 0.5)):
            killed_at.append(len(rows(killed / "metrics.jsonl")))
    assert len(killed_at) == KILLS, f"only {len(killed_at)} of {KILLS} kills hit a running process"
    done = launch(command(killed))
    assert done.returncode == 0, done.output
    assert "from step" in done.output, "the last launch did not resume"

    for name in ("policy", "critic", "ema"):
        assert_same_weights(killed / name, whole / name)
    assert figures(killed / "metrics.jsonl") == figures(whole / "metrics.jsonl")
    assert [r["step"] for r in rows(killed / "metrics.jsonl")] == list(range(1, ITERATIONS + 1))
    assert rows(killed / "samples.jsonl") == rows(whole / "samples.jsonl")
    kept = sorted(p.name for p in (killed / "checkpoints").iterdir())
    assert kept == [f"step-{s:08d}" for s in (ITERATIONS - 1, ITERATIONS)], "keep_last, and no partial folder left"


def test_dpo_killed_in_the_middle(tiny, launch, tmp_path):
    def command(folder: Path) -> list[str]:
        settings = {
            "model": tiny.policy, "data": tiny.pairs, "output_dir": folder, "dtype": "fp32", "batch": 8, "epochs": 2.0,
            "lr": 1e-3, "max_length": 128, "save_every": 2, "resume": "auto", "data_cache": "False",
            "data_split": "train", "eval_split": "", "gradient_checkpointing": "False",
        }  # fmt: skip
        return ["recipes/dpo_llama3.py", *flags_of(settings)]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = launch(command(whole))
    assert done.returncode == 0, done.output
    running = launch.start(command(killed))
    assert kill_when(running, lambda: len(rows(killed / "metrics.jsonl")) >= 5, 0.05)
    done = launch(command(killed))
    assert done.returncode == 0, done.output
    assert "from step" in done.output
    assert_same_weights(killed / "model", whole / "model")
    assert figures(killed / "metrics.jsonl") == figures(whole / "metrics.jsonl")


def test_a_partial_checkpoint_is_no_checkpoint(tiny, tmp_path):
    """A folder that a kill left under its partial name, or without its last file, is not resumed from."""
    from rto_fast.config import RTOConfig
    from rto_fast.engine import Checkpoints

    config = RTOConfig(**small_run(tiny, tmp_path))
    (tmp_path / "checkpoints" / "partial-00000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000004").mkdir()
    assert Checkpoints(config).read() is None


@pytest.mark.parametrize("change", [{"policy_lr": 2e-3}, {"beta1": 0.1}, {"seed": 1}])
def test_a_checkpoint_of_other_settings_is_refused(tiny, tmp_path, change):
    from rto_fast.config import ConfigError, RTOConfig
    from rto_fast.engine import Checkpoints

    mine = RTOConfig(**small_run(tiny, tmp_path, policy_lr=1e-3))
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    record = {"step": 1, "config": Checkpoints(mine).fingerprint, "world_size": 1, "state": {}}
    (folder / "state.json").write_text(json.dumps(record))
    assert Checkpoints(mine).read() == (1, {})
    name = next(iter(change))
    with pytest.raises(ConfigError, match=name):
        Checkpoints(RTOConfig(**(small_run(tiny, tmp_path, policy_lr=1e-3) | change))).read()
