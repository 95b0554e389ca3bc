"""Runs that are killed: a fork trains and, where asked to, dies inside a checkpoint's writing.

Nobody looks at the report of these runs, so none is drawn.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from launches import start_ranks

from rto_fast import cli, run
from rto_fast.backend import checkpoints
from rto_fast.backend.checkpoints import Checkpoints
from rto_fast.backend.train_engine import TrainEngine
from rto_fast.config import DPOConfig, RMConfig, RTOConfig, SFTConfig

RUNS: dict[str, tuple[type, str]] = {
    "rto": (RTOConfig, "rto_fast.trainer:train"),
    "sft": (SFTConfig, "rto_fast.supervised.sft:train_sft"),
    "rm": (RMConfig, "rto_fast.supervised.reward_model:train_rm"),
    "dpo": (DPOConfig, "rto_fast.supervised.dpo:train_dpo"),
}


def die_at(event: int, log: Path) -> None:
    """SIGKILL to this process at the event-th step of writing checkpoints, counted from 1.

    A step is the beginning or the end of a call that writes, flushes, moves or deletes.
    """
    seen, saving = 0, False

    def mortal(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            reach(f"before {name}")
            out = call(*args, **kwargs)
            reach(f"after {name}")
            return out

        return step

    def reach(place: str) -> None:
        nonlocal seen
        seen += saving
        if saving and seen == event:
            with log.open("a") as f:
                f.write(f"killed {place}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def save(*args: Any) -> None:
        nonlocal saving
        saving = True
        whole(*args)
        saving = False
        print(f"a checkpoint took {seen} steps", flush=True)

    whole, Checkpoints.save = Checkpoints.save, save
    TrainEngine.save = mortal("an engine's state", TrainEngine.save)
    checkpoints.fsync = mortal("a flush", checkpoints.fsync)
    torch.save = mortal("a file of tensors", torch.save)
    os.rename = mortal("a rename", os.rename)
    shutil.rmtree = mortal("a deletion", shutil.rmtree)


def live(kind: str, settings: dict[str, Any], log: Path, event: int) -> None:
    """One life of a rank: exit code 0 where the run ended."""
    run.report_run = lambda folder, **_: folder
    if event:
        die_at(event, log)
    make, train = RUNS[kind]
    cli._run(make(**settings), train)


class Lives:
    """Starts runs, on one or more ranks."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def start(self, kind: str, settings: dict[str, Any], *, ranks: int = 1, die_at: int = 0) -> list[Any]:
        """The processes of a run; die_at: see the function of this name (on every rank)."""
        return start_ranks(ranks, self.log, live, kind, settings, self.log, die_at)

    def run(self, kind: str, settings: dict[str, Any], *, ranks: int = 1, die_at: int = 0) -> int:
        """A whole life; the first rank's exit code (negative: killed by that signal)."""
        processes = self.start(kind, settings, ranks=ranks, die_at=die_at)
        for process in processes:
            process.join(240)
        return processes[0].exitcode

    def kill(
        self,
        processes: list[Any],
        ready: Callable[[], bool],
        delay_s: float,
        number: int = signal.SIGKILL,
        ranks: int | None = None,
    ) -> None:
        """A signal to the first `ranks` ranks (None: all), delay_s after `ready`, and the end of all.

        AssertionError where the run ended before that.
        """
        deadline = time.monotonic() + 120
        while not ready():
            assert time.monotonic() < deadline, self.log.read_text()
            assert all(p.is_alive() for p in processes), self.log.read_text()
            time.sleep(0.002)
        time.sleep(delay_s)
        alive = all(p.is_alive() for p in processes)
        for process in processes[:ranks]:
            if process.is_alive():
                os.kill(process.pid, number)
        for process in processes:
            process.join(240)
        assert alive, f"the run had ended before the kill:\n{self.log.read_text()}"
