"""Atomic, numbered checkpoints of a run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from rto_fast import distributed
from rto_fast.backend.train_engine import TrainEngine
from rto_fast.config import RunConfig, check_wandb
from rto_fast.errors import ConfigError, require
from rto_fast.redact import redacted

CHECKPOINTS, STATE = "checkpoints", "state.json"


def checkpoint_steps(root: Path) -> list[int]:
    """Steps of the whole checkpoints under `root`, oldest first."""
    return sorted(int(p.parent.name.removeprefix("step-")) for p in root.glob(f"step-*/{STATE}"))


def find_checkpoint(output_dir: str | Path, step: int = 0) -> tuple[Path, dict[str, Any]]:
    """(folder, record) of a run's checkpoint `step`, 0 = the newest; ConfigError where there is none."""
    root = Path(output_dir) / CHECKPOINTS
    steps = checkpoint_steps(root)
    if not steps:
        raise ConfigError(f"run: {output_dir} holds no checkpoint (looked in {root})")
    if step and step not in steps:
        raise ConfigError(f"step: no checkpoint {step} in {root}; there are {', '.join(map(str, steps))}")
    folder = root / f"step-{step or steps[-1]:08d}"
    return folder, json.loads((folder / STATE).read_text())


class Checkpoints:
    """Atomic, numbered checkpoints of a run: a folder appears under its name only when it is whole."""

    def __init__(self, config: RunConfig) -> None:
        self.root = Path(config.output_dir) / CHECKPOINTS
        self.keep = config.keep_last
        self.fingerprint = json.loads(json.dumps(config.fingerprint()))

    def save(self, step: int, engines: dict[str, TrainEngine], state: dict[str, Any], tensors: dict[str, Any]) -> None:
        """Writes checkpoint `step` from all ranks, publishes it by a rename, drops the oldest and partial ones.

        state: JSON values; tensors: anything torch.save takes, written by rank 0.
        """
        target, partial = self._folder(step), self._partial(step)
        if distributed.rank() == 0:
            for left in self.root.glob("partial-*"):  # by a kill in the middle of this
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        distributed.barrier()
        for name, engine in engines.items():
            engine.save(partial, name)
        distributed.barrier()
        if distributed.rank() == 0:
            torch.save(tensors, partial / "tensors.pt")
            record = {"step": step, "config": self.fingerprint, "world_size": distributed.world_size(), "state": state}
            (partial / STATE).write_text(json.dumps(record))
            for path in partial.rglob("*"):
                _fsync(path)
            os.rename(partial, target)
            _fsync(self.root)
            for old in self.steps()[: -self.keep]:
                os.rename(self._folder(old), self._partial(old))
                shutil.rmtree(self._partial(old))
        distributed.barrier()

    def steps(self) -> list[int]:
        """Steps of whole checkpoints, oldest first."""
        return checkpoint_steps(self.root)

    def read(self) -> tuple[int, dict[str, Any]] | None:
        """(step, state) of the newest checkpoint, or None; ConfigError where it is another run's."""
        if not self.steps():
            return None
        step = self.steps()[-1]
        path = self._folder(step) / STATE
        record = json.loads(path.read_text())
        self._check(record, path)
        return step, record["state"]

    def load(self, step: int, engines: dict[str, TrainEngine]) -> dict[str, Any]:
        """Loads the engines' state and returns the tensors saved beside them.

        Those are maps of the file, so that no rank holds what it does not need: copy what is kept.
        """
        for name, engine in engines.items():
            engine.load(self._folder(step), name)
        return torch.load(self._folder(step) / "tensors.pt", weights_only=False, mmap=True)

    def _check(self, record: dict[str, Any], path: Path) -> None:
        theirs = redacted(record["config"])  # earlier versions kept passwords
        changed = [k for k in self.fingerprint if theirs.get(k) != self.fingerprint[k]]
        if changed:
            was = ", ".join(f"{k}={theirs.get(k)!r} (now {self.fingerprint[k]!r})" for k in changed[:4])
            raise ConfigError(f"resume: {path.parent} was written by a run with other settings: {was}")
        if record["world_size"] != distributed.world_size():
            raise ConfigError(
                f"resume: {path.parent} was written by {record['world_size']} ranks, this run has "
                f"{distributed.world_size()}"
            )

    def _folder(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def _partial(self, step: int) -> Path:
        """Where a checkpoint lies while it is written or deleted."""
        return self.root / f"partial-{step:08d}"


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_output(config: RunConfig) -> Checkpoints:
    """The run's checkpoints; ConfigError where the folder holds a run that is not to be resumed. Writes nothing."""
    check_wandb(config.wandb_project)
    folder = Path(config.output_dir)
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    require(there.is_dir(), f"output_dir: {there} is a file")
    require(os.access(there, os.W_OK | os.X_OK), f"output_dir: no permission to write in {there}")
    if config.resume == "never" and folder.is_dir() and any(p.suffix != ".log" for p in folder.iterdir()):
        raise ConfigError(f"output_dir: {folder} already holds a run; pass --resume auto to go on with it, or another "
                          "--output-dir")  # fmt: skip
    distributed.barrier()
    return Checkpoints(config)
