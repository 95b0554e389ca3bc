"""SIGKILL at any moment, then `--resume auto`: the outcome is that of the run that was never killed, bit for bit."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from loop_helpers import small_run
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

ITERATIONS = 12
SETTINGS = {
    "iterations": ITERATIONS, "save_every": 1, "keep_last": 2, "resume": "auto", "ppo_epochs": 2, "ema_decay": 0.9,
    "kl_target": 0.02, "kl_horizon": 50, "policy_lr": 1e-3, "critic_lr": 1e-3, "report_samples": 4,
}  # fmt: skip
SAVING_STEPS = 44
"""Steps of writing a checkpoint of policy and critic at which `kill_worker.die_at` can strike."""
MEASURED = ("time/", "rate/", "memory/", "run/", "sync/seconds")
"""Metrics that two equal runs do not share."""


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    from kill_worker import Lives

    return Lives(tmp_path_factory.mktemp("lives") / "log")


def rows(path: Path) -> list[dict]:
    """Whole lines of a JSONL file that may be in the middle of being written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]


def figures(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows(path)]


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").glob("*"))


def assert_same_weights(a: Path, b: Path, file: str = "model.safetensors") -> None:
    """Bit for bit, NaN included."""
    ours, theirs = load_file(a / file), load_file(b / file)
    assert ours.keys() == theirs.keys()
    different = [n for n in ours if not torch.equal(ours[n].view(torch.uint8), theirs[n].view(torch.uint8))]
    assert not different, f"{a.name}: {len(different)} of {len(ours)} tensors differ, {different[:3]}"


def assert_same_run(killed: Path, whole: Path) -> None:
    """Policy, critic and average, metrics and samples; and the newest checkpoints, no more."""
    for name in ("policy", "critic", "ema"):
        assert_same_weights(killed / name, whole / name)
    assert figures(killed / "metrics.jsonl") == figures(whole / "metrics.jsonl")
    steps = [r["step"] for r in rows(whole / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert rows(killed / "samples.jsonl") == rows(whole / "samples.jsonl")
    assert len(rows(whole / "samples.jsonl")) > 0
    assert checkpoints(killed) == checkpoints(whole) == [f"step-{s:08d}" for s in steps[-2:]]


def killed_at_random(lives, kind: str, settings: dict, rng: random.Random, row: int, s_a_row: float, ranks: int = 1):
    """A life that ends by SIGKILL up to two rows' time after metrics.jsonl has `row` rows."""
    path = Path(settings["output_dir"]) / "metrics.jsonl"
    processes = lives.start(kind, settings, ranks=ranks)
    lives.kill(processes, lambda: len(rows(path)) >= row, rng.uniform(0, 2 * s_a_row))


def test_rto_killed_five_times(tiny, lives, tmp_path):
    """Three kills at random moments and two inside a checkpoint's writing; adaptive KL, an average, two PPO epochs."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert lives.run("rto", small_run(tiny, whole, **SETTINGS)) == 0, lives.log.read_text()
    s_a_row = rows(whole / "metrics.jsonl")[-1]["run/elapsed_s"] / ITERATIONS

    rng, settings, left = random.Random(20), small_run(tiny, killed, **SETTINGS), []
    for kill in range(5):
        if kill % 2:
            event = rng.randint(1, SAVING_STEPS)
            assert lives.run("rto", settings, die_at=event) == -signal.SIGKILL, lives.log.read_text()
            left.append([name for name in checkpoints(killed) if name.startswith("partial-")])
        else:
            killed_at_random(lives, "rto", settings, rng, 1 + 2 * kill, s_a_row)
    assert any(left), "no kill has left a partial checkpoint"
    assert lives.run("rto", settings) == 0, lives.log.read_text()
    assert lives.log.read_text().count("killed before") + lives.log.read_text().count("killed after") == 2
    assert_same_run(killed, whole)


@pytest.mark.parametrize(("ranks", "zero_stage", "number"), [(1, 2, signal.SIGTERM), (2, 3, signal.SIGUSR1)])
def test_rto_stopped_by_a_signal(tiny, lives, tmp_path, ranks, zero_stage, number):
    """At five random moments (on two ranks three, to the first rank alone): no step is lost, by default settings."""
    kills, iterations = (5, 12) if ranks == 1 else (3, 8)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    changes = SETTINGS | {"iterations": iterations, "save_every": 0, "zero_stage": zero_stage}
    assert lives.run("rto", small_run(tiny, whole, **changes), ranks=ranks) == 0, lives.log.read_text()
    s_a_row = rows(whole / "metrics.jsonl")[-1]["run/elapsed_s"] / iterations
    assert checkpoints(whole) == []

    rng, settings, path, done = random.Random(7), small_run(tiny, killed, **changes), killed / "metrics.jsonl", 0
    for _ in range(kills):
        seen = len(lives.log.read_text())
        processes = lives.start("rto", settings, ranks=ranks)
        lives.kill(processes, lambda done=done: len(rows(path)) > done, rng.uniform(0, s_a_row), number, ranks=1)
        said = lives.log.read_text()[seen:]
        assert [p.exitcode for p in processes] == [3] * ranks, said
        done = len(rows(path))
        assert f"{signal.Signals(number).name}: stopped behind step {done}, whose checkpoint is whole" in said
        assert "Traceback" not in said
        assert checkpoints(killed)[-1] == f"step-{done:08d}"
    assert done < iterations
    assert lives.run("rto", settings, ranks=ranks) == 0, lives.log.read_text()
    for name in ("policy", "critic", "ema"):
        assert_same_weights(killed / name, whole / name)
    assert figures(path) == figures(whole / "metrics.jsonl")
    assert rows(killed / "samples.jsonl") == rows(whole / "samples.jsonl")


def test_rto_on_two_ranks_killed(tiny, lives, tmp_path):
    """ZeRO-3 in bf16: each rank's partitions come back to it."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    changes = SETTINGS | {"zero_stage": 3, "dtype": "bf16", "iterations": 6}
    assert lives.run("rto", small_run(tiny, whole, **changes), ranks=2) == 0, lives.log.read_text()
    s_a_row = rows(whole / "metrics.jsonl")[-1]["run/elapsed_s"] / 6
    settings = small_run(tiny, killed, **changes)
    for row in (1, 2):
        killed_at_random(lives, "rto", settings, random.Random(row), row, s_a_row, ranks=2)
    assert lives.run("rto", settings, ranks=2) == 0, lives.log.read_text()
    assert_same_run(killed, whole)


def test_rto_of_adapters_killed(tiny, lives, tmp_path):
    """Once in the writing of a checkpoint of two adapters on one base, once at a random moment."""
    pytest.importorskip("peft")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    adapters = {"lora_rank": 4, "lora_policy_lr": 1e-2, "lora_critic_lr": 1e-2, "ema_decay": 0.0, "iterations": 6}
    own = {name: value for name, value in SETTINGS.items() if name not in ("policy_lr", "critic_lr")}
    changes = own | adapters | {"rollout_engine": "transformers"}
    assert lives.run("rto", small_run(tiny, whole, **changes)) == 0, lives.log.read_text()
    s_a_row = rows(whole / "metrics.jsonl")[-1]["run/elapsed_s"] / 6
    settings, rng = small_run(tiny, killed, **changes), random.Random(3)
    assert lives.run("rto", settings, die_at=rng.randint(1, SAVING_STEPS)) == -signal.SIGKILL, lives.log.read_text()
    killed_at_random(lives, "rto", settings, rng, 2, s_a_row)
    assert lives.run("rto", settings) == 0, lives.log.read_text()
    for name in ("policy", "critic"):
        assert_same_weights(killed / name, whole / name, "adapter_model.safetensors")
    assert figures(killed / "metrics.jsonl") == figures(whole / "metrics.jsonl")
    assert rows(killed / "samples.jsonl") == rows(whole / "samples.jsonl")
    assert checkpoints(killed) == checkpoints(whole) == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize("online", ["prime", "dpo"])
def test_rto_killed_while_the_token_reward_learns(tiny, lives, tmp_path, online):
    """Once in the writing of a checkpoint of its three engines, once at a random moment."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    changes = SETTINGS | {"iterations": 9, "online": online, "online_lr": 1e-3, "responses_per_prompt": 2}
    assert lives.run("rto", small_run(tiny, whole, **changes)) == 0, lives.log.read_text()
    s_a_row = rows(whole / "metrics.jsonl")[-1]["run/elapsed_s"] / 9
    settings, rng = small_run(tiny, killed, **changes), random.Random(online)
    assert lives.run("rto", settings, die_at=SAVING_STEPS + rng.randint(1, 20)) == -signal.SIGKILL
    killed_at_random(lives, "rto", settings, rng, 2, s_a_row)
    assert lives.run("rto", settings) == 0, lives.log.read_text()
    assert_same_run(killed, whole)
    assert_same_weights(killed / "dpo", whole / "dpo")
    moved, start = load_file(whole / "dpo" / "model.safetensors"), load_file(f"{tiny.dpo}/model.safetensors")
    assert any(not torch.equal(moved[name], tensor) for name, tensor in start.items())


def test_killed_while_a_checkpoint_is_written(tiny, lives, tmp_path):
    """Wherever in its writing: what can be resumed afterwards is the old checkpoint or the new one, whole."""
    changes = SETTINGS | {"iterations": 2, "keep_last": 1, "report_samples": 0}
    assert lives.run("rto", small_run(tiny, tmp_path / "whole", **changes), die_at=10**6) == 0, lives.log.read_text()
    took = [int(line.split()[-2]) for line in lives.log.read_text().splitlines() if "took" in line]
    first, both = took[-2:]  # the log holds earlier tests' too
    last = both - first
    for step in (1, last // 2, last - 5, last - 3, last):
        folder = tmp_path / f"killed{step}"
        settings = small_run(tiny, folder, **changes)
        assert lives.run("rto", settings, die_at=first + step) == -signal.SIGKILL, lives.log.read_text()
        whole = [name for name in checkpoints(folder) if name.startswith("step-")]
        assert whole in (["step-00000001"], ["step-00000002"], ["step-00000001", "step-00000002"])
        for name in whole:
            files = {p.name for p in (folder / "checkpoints" / name).rglob("*.*")}
            assert {"state.json", "tensors.pt", "mp_rank_00_model_states.pt"} <= files, f"step {step}: {name}"
        assert lives.run("rto", settings) == 0, lives.log.read_text()
        assert_same_weights(folder / "policy", tmp_path / "whole" / "policy")


@pytest.mark.parametrize("kind", ["sft", "rm", "dpo"])
def test_stage_killed_twice(tiny, lives, tmp_path, kind):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {
        "model": tiny.policy, "data": tiny.texts if kind == "sft" else tiny.pairs, "dtype": "fp32", "batch": 8,
        "epochs": 3.0, "lr": 1e-3, "max_length": 64, "save_every": 2, "resume": "auto", "data_cache": False,
        "data_workers": 1, "gradient_checkpointing": False,
    }  # fmt: skip
    assert lives.run(kind, settings | {"output_dir": str(whole)}) == 0, lives.log.read_text()
    done = rows(whole / "metrics.jsonl")
    settings["output_dir"] = str(killed)
    rng = random.Random(kind)
    killed_at_random(lives, kind, settings, rng, 5, done[-1]["run/elapsed_s"] / len(done))
    assert lives.run(kind, settings, die_at=rng.randint(1, 24)) == -signal.SIGKILL, lives.log.read_text()
    processes, left = lives.start(kind, settings), len(rows(killed / "metrics.jsonl"))
    lives.kill(processes, lambda: len(rows(killed / "metrics.jsonl")) > left, 0, signal.SIGTERM)
    assert processes[0].exitcode == 3, lives.log.read_text()
    assert checkpoints(killed)[-1] == f"step-{len(rows(killed / 'metrics.jsonl')):08d}"
    assert lives.run(kind, settings) == 0, lives.log.read_text()
    assert_same_weights(killed / "model", whole / "model")
    assert figures(killed / "metrics.jsonl") == figures(whole / "metrics.jsonl")
    assert json.loads((killed / "model" / "config.json").read_text()) == json.loads(
        (whole / "model" / "config.json").read_text()
    )
    assert checkpoints(killed) == checkpoints(whole)


def test_a_partial_checkpoint_is_no_checkpoint(tiny, tmp_path):
    """A folder that a kill left under its partial name, or without its last file, is not resumed from."""
    from rto_fast.backend.checkpoints import Checkpoints
    from rto_fast.config import RTOConfig

    config = RTOConfig(**small_run(tiny, tmp_path))
    (tmp_path / "checkpoints" / "partial-00000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000004").mkdir()
    assert Checkpoints(config).read() is None


@pytest.mark.parametrize("change", [{"policy_lr": 2e-3}, {"beta1": 0.1}, {"seed": 1}])
def test_a_checkpoint_of_other_settings_is_refused(tiny, tmp_path, change):
    from rto_fast.backend.checkpoints import Checkpoints
    from rto_fast.config import RTOConfig
    from rto_fast.errors import ConfigError

    mine = RTOConfig(**small_run(tiny, tmp_path, policy_lr=1e-3))
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    record = {"step": 1, "config": Checkpoints(mine).fingerprint, "world_size": 1, "state": {}}
    (folder / "state.json").write_text(json.dumps(record))
    assert Checkpoints(mine).read() == (1, {})
    name = next(iter(change))
    with pytest.raises(ConfigError, match=name):
        Checkpoints(RTOConfig(**(small_run(tiny, tmp_path, policy_lr=1e-3) | change))).read()
