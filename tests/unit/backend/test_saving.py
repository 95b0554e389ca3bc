"""When a run saves: by steps, by time, by signals; and whether the disk has the room."""

from __future__ import annotations

import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
from loop_helpers import small_run

from rto_fast.backend import checkpoints, saving
from rto_fast.backend.saving import Saving
from rto_fast.config import RTOConfig, SFTConfig
from rto_fast.errors import ConfigError, Preempted
from rto_fast.trainer import train


def saved_steps(config: SFTConfig, clock: SimpleNamespace, monkeypatch, *, step_s: float, save_s: float) -> list[int]:
    """The steps of ten that are saved, each step and each checkpoint taking its seconds."""
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: clock.now))
    steps = []

    def save() -> None:
        steps.append(step)
        clock.now += save_s

    with Saving(config) as it:
        for step in range(1, 11):
            clock.now += step_s
            it.after(step, save)
    return steps


@pytest.mark.parametrize(
    ("settings", "step_s", "save_s", "expected"),
    [
        ({}, 60, 0, []),  # ten minutes in all
        ({}, 400, 0, [3, 6, 9]),
        ({}, 400, 600, [3]),  # a checkpoint of 10 minutes waits 100 for the next one
        ({"save_minutes": 5.0}, 60, 0, [5, 10]),
        ({"save_minutes": 0.0}, 4000, 0, []),
        ({"save_every": 4}, 4000, 0, [4, 8]),
    ],
)
def test_steps_that_are_saved(monkeypatch, settings, step_s, save_s, expected):
    config = SFTConfig(model="m", data="d", **settings)
    assert saved_steps(config, SimpleNamespace(now=7.0), monkeypatch, step_s=step_s, save_s=save_s) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops(number):
    """At the end of the step, once; afterwards the process has its own handlers again."""
    before, saves = signal.getsignal(number), []
    with Saving(SFTConfig(model="m", data="d", save_every=3)) as it:
        it.after(1, lambda: saves.append(1))
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert saves == []
        with pytest.raises(Preempted, match=rf"{number.name}: stopped behind step 2, .*--resume auto"):
            it.after(2, lambda: saves.append(2))
    assert saves == [2]
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("settings", [{"dtype": "bf16", "ema_decay": 0.9}, {"zero_stage": 0}])
def test_what_a_run_writes_is_known_before(tmp_path, monkeypatch, one_rank, settings):
    """The estimate is the size of what is written, but for what is small; with less than that free nothing begins."""
    from loop_helpers import make_tiny_models

    from rto_fast import trainer

    tiny = make_tiny_models(tmp_path / "models", hidden_size=128, intermediate_size=256)
    config = small_run(tiny, tmp_path / "out", save_every=1, keep_last=1, iterations=2, report=False, **settings)
    free = 0

    def disk(_):
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", disk)
    with pytest.raises(ConfigError, match=r"output_dir: the run writes .* GiB .*1 \+ 1 checkpoints .* are free in .*"):
        trainer.train(RTOConfig(**config))
    assert not (tmp_path / "out").exists()

    free = 2**40
    trainer.train(RTOConfig(**config))
    folder = tmp_path / "out"
    names = ["policy", "critic"] + (["ema"] if "ema_decay" in settings else [])
    models = sum(checkpoints._bytes_in(folder / name) for name in names)
    written = models + 2 * checkpoints._bytes_in(folder / "checkpoints")
    shutil.rmtree(folder)
    for share, fits in ((0.8, False), (1.1, True)):
        free = round(written * share)
        if fits:
            trainer.train(RTOConfig(**config))
        else:
            with pytest.raises(ConfigError, match="output_dir: the run writes"):
                trainer.train(RTOConfig(**config))


def test_no_room_for_checkpoints_by_time_is_a_warning(tmp_path, monkeypatch):
    from torch import nn

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    config = SFTConfig(model="m", data="d", output_dir=str(tmp_path), dtype="fp32")
    model = nn.Linear(20, 20)  # 1,680 bytes, and 3 checkpoints of four times that
    said = checkpoints.check_space(config, [model])
    assert "no room for 2 + 1 checkpoints" in said
    assert "--save-minutes 0" in said
    assert not checkpoints.check_space(
        SFTConfig(model="m", data="d", output_dir=str(tmp_path), save_minutes=0), [model]
    )


@pytest.mark.parametrize("stage", [0, 2])
def test_the_size_that_is_said_at_the_start_is_that_of_a_checkpoint(one_rank, tiny, tmp_path, stage):
    """Of policy, critic and running average, within the files' headers and the few numbers beside."""
    run = train(RTOConfig(**small_run(tiny, tmp_path, zero_stage=stage, ema_decay=0.9, iterations=1, save_every=1)))
    written = sum(p.stat().st_size for p in (tmp_path / "checkpoints").rglob("*") if p.is_file())
    assert run.checkpoint_bytes <= written < 1.2 * run.checkpoint_bytes + 200_000
    assert "checkpoints: every 1 step" in Saving(run.config).plan(260 * 2**30)
    assert Saving(run.config).plan(260 * 2**30).endswith("; 260.0 GiB each, 140 s at 2 GB/s")
