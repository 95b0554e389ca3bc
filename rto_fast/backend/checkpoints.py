"""Atomic, numbered checkpoints of a run."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rto_fast import distributed
from rto_fast.backend.inputs import Contents, contents_of, difference
from rto_fast.backend.output_lock import LOCK, OWNER
from rto_fast.backend.train_engine import TrainEngine
from rto_fast.config import RunConfig, check_wandb
from rto_fast.data.adapter_folder import ADAPTER
from rto_fast.errors import ConfigError, StorageError, require
from rto_fast.logs.files import METRICS, SAMPLES, fingerprint, fsync, read_rows, writing
from rto_fast.redact import redacted

CHECKPOINTS, STATE = "checkpoints", "state.json"
STEP, PARTIAL = re.compile(r"step-(\d{8,})"), re.compile(r"partial-\d{8,}")
"""Names of the folders that are ours."""


def checkpoint_steps(root: Path) -> list[int]:
    """Steps of the whole checkpoints under `root`, oldest first."""
    found = (STEP.fullmatch(p.parent.name) for p in root.glob(f"step-*/{STATE}"))
    return sorted(int(name[1]) for name in found if name)


def read_record(folder: Path, trusted: bool = False) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises Torn where a file lacks, or is not what was written.

    Raises ConfigError where another user owns a part of it, unless it is `trusted`: its files are pickles.
    """
    try:
        record = json.loads((folder / STATE).read_text())
        step, files = record["step"], dict(record.get("files", {}))
        require(f"step-{step:08d}" == folder.name, f"it is that of step {step}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Torn(f"{folder / STATE} cannot be read") from error
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            raise Torn(f"{path} is gone")
        size = path.stat().st_size
        if not str(written).startswith(f"{size} "):
            raise Torn(f"{path} has {size} bytes, {str(written).partition(' ')[0]} were written")
        if fingerprint(path) != written:
            raise Torn(f"{path} holds other bytes than were written")
    if not trusted:
        for path in (folder.parents[1], folder.parent, folder, *folder.rglob("*")):
            if path.stat().st_uid != os.geteuid():
                raise ConfigError(
                    f"checkpoint {step}: {path} belongs to another user, and reading a checkpoint can run code that "
                    "its writer chose; copy what you trust, or pass --trust-run-folder True"
                )
    return record


class Torn(ValueError):
    """A checkpoint that is not whole; the message names the file."""


def find_checkpoint(output_dir: str | Path, step: int = 0, trusted: bool = False) -> tuple[Path, dict[str, Any]]:
    """(folder, record) of a run's checkpoint `step`, 0 = the newest that is whole; ConfigError where there is none."""
    root = Path(output_dir) / CHECKPOINTS
    steps = checkpoint_steps(root)
    if not steps:
        raise ConfigError(f"run: {output_dir} holds no checkpoint (looked in {root})")
    if step and step not in steps:
        raise ConfigError(f"step: no checkpoint {step} in {root}; there are {', '.join(map(str, steps))}")
    torn = ""
    for number in [step] if step else reversed(steps):
        folder = root / f"step-{number:08d}"
        try:
            return folder, read_record(folder, trusted)
        except Torn as error:
            torn = torn or str(error)
    raise ConfigError(f"run: no checkpoint asked for is whole: {torn}")


class Checkpoints:
    """Atomic, numbered checkpoints of a run: a folder appears under its name only when it is whole."""

    def __init__(self, config: RunConfig) -> None:
        self.root = Path(config.output_dir) / CHECKPOINTS
        self.keep = config.keep_last
        self.fingerprint = json.loads(json.dumps(config.fingerprint()))
        self.trusted = config.trust_run_folder
        self.torn: list[str] = []
        """Warnings of checkpoints that `read` went past."""
        self.inputs: Contents = {}
        self._found: dict[str, Any] = {}

    def save(self, step: int, engines: dict[str, TrainEngine], state: dict[str, Any], tensors: dict[str, Any]) -> None:
        """Writes checkpoint `step` from all ranks, publishes it by a rename, drops the oldest and partial ones.

        state: JSON values; tensors: anything torch.save takes, written by rank 0.
        """
        target, partial = self._folder(step), self._partial(step)
        try:
            with writing(target):
                self._save(step, target, partial, engines, state, tensors)
        except StorageError:
            if distributed.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _save(
        self, step: int, target: Path, partial: Path, engines: dict[str, TrainEngine], state: dict[str, Any],
        tensors: dict[str, Any],
    ) -> None:  # fmt: skip
        if distributed.rank() == 0:
            for left in self.root.glob("partial-*"):  # by a kill in the middle of this
                if PARTIAL.fullmatch(left.name) and left.is_dir():
                    shutil.rmtree(left)
            partial.mkdir(parents=True)
        distributed.barrier()
        for name, engine in engines.items():
            engine.save(partial, name)
        distributed.barrier()
        if distributed.rank() == 0:
            torch.save(tensors, partial / "tensors.pt")
            files = {str(p.relative_to(partial)): fingerprint(p) for p in partial.rglob("*") if p.is_file()}
            record = {"step": step, "files": files, "config": self.fingerprint, "inputs": self.inputs,
                      "world_size": distributed.world_size(), "state": state}  # fmt: skip
            (partial / STATE).write_text(json.dumps(record))
            for path in partial.rglob("*"):
                fsync(path)
            if target.exists():  # one that is not whole, or not ours
                os.rename(target, _unused(target.with_name(f"aside-{target.name}")))
            os.rename(partial, target)
            fsync(self.root)
            for old in self.steps()[: -self.keep]:
                os.rename(self._folder(old), self._partial(old))
                shutil.rmtree(self._partial(old))
        distributed.barrier()

    def steps(self) -> list[int]:
        """Steps of whole checkpoints, oldest first."""
        return checkpoint_steps(self.root)

    def read(self) -> tuple[int, dict[str, Any]] | None:
        """(step, state) of the newest whole checkpoint, or None where there is none at all; collective.

        Rank 0 reads and decides for all. Raises ConfigError where it is another run's or another user's, and where none
        of several is whole.
        """
        failure = ""
        if distributed.rank() == 0:
            try:
                self._find()
            except ConfigError as error:
                failure = str(error)
        failure, self._found, self.torn = distributed.broadcast_object((failure, self._found, self.torn))
        if failure:
            raise ConfigError(failure)
        return (self._found["step"], self._found["state"]) if self._found else None

    def _find(self) -> None:
        """Reads the checkpoints, the newest first, up to one that is whole."""
        for step in reversed(self.steps()):
            folder = self._folder(step)
            try:
                record = read_record(folder, self.trusted)
            except Torn as error:
                self.torn.append(f"checkpoint {step} is not whole and is left out: {error}")
                continue
            self._check(record, folder / STATE)
            self._check_logs()
            self._found = record
            return
        if self.torn:
            raise ConfigError(f"resume: {self.torn[0]}; no older one is whole, so start in another --output-dir")

    def _check_logs(self) -> None:
        """ConfigError where the run's own rows, which go on, cannot be read."""
        for name in (METRICS, SAMPLES):
            try:
                read_rows(self.root.parent / name)
            except ValueError as error:
                raise ConfigError(f"resume: {error}; mend it, or move it away and start its rows afresh") from error

    def check_inputs(self, config: RunConfig) -> None:
        """Fingerprints the models and data; ConfigError where the checkpoint's run read others. Collective."""
        self.inputs = distributed.broadcast_object(contents_of(config) if distributed.rank() == 0 else {})
        if changed := difference(self._found.get("inputs", {}), self.inputs):
            raise ConfigError(
                f"resume: {changed} since checkpoint {self._found['step']} was written; put back what was there, or "
                "start afresh in another --output-dir"
            )

    def load(self, step: int, engines: dict[str, TrainEngine]) -> dict[str, Any]:
        """Loads the engines' state and returns the tensors saved beside them.

        Those are maps of the file, so that no rank holds what it does not need: copy what is kept.
        """
        for name, engine in engines.items():
            engine.load(self._folder(step), name)
        return torch.load(self._folder(step) / "tensors.pt", weights_only=True, mmap=True)

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


def check_space(config: RunConfig, models: Sequence[nn.Module], exports: int = 1, averaged: bool = False) -> str:
    """Raises ConfigError where the disk lacks the room for what the run will write; collective.

    exports: how often the models are exported; averaged: whether the first one's running average goes with them.
    Returns a warning, or "": checkpoints that are only written when the run takes long, and would not fit.
    """
    sizes = [_numbers(model) for model in models]
    exported = exports * (2 if config.dtype == "bf16" else 4) * (sum(sizes) + (sizes[0] if averaged else 0))
    one = checkpoint_bytes(config, models, averaged)
    root = Path(config.output_dir) / CHECKPOINTS
    there = next(p for p in (root, *root.absolute().parents) if p.exists())
    free = distributed.broadcast_object(shutil.disk_usage(there).free + _bytes_in(root))
    saved = (config.keep_last + 1) * one if config.save_every or config.save_minutes else 0
    if free >= exported + saved:
        return ""
    left = f"{free / 2**30:.1f} GiB are free in {there}"
    remedy = "free some, pass another --output-dir"
    if free < exported or config.save_every:
        raise ConfigError(
            f"output_dir: the run writes {(exported + saved * bool(config.save_every)) / 2**30:.1f} GiB "
            f"({exported / 2**30:.1f} of models, {config.keep_last} + 1 checkpoints of {one / 2**30:.1f}), and {left}; "
            f"{remedy}, or keep fewer with --keep-last"
        )
    return (
        f"output_dir: no room for {config.keep_last} + 1 checkpoints of {one / 2**30:.1f} GiB beside the models, "
        f"{left}: a run that takes over {config.save_minutes:g} minutes may stop there; {remedy}, or --save-minutes 0"
    )


def checkpoint_bytes(config: RunConfig, models: Sequence[nn.Module], averaged: bool = False) -> int:
    """Size of a checkpoint of these models in training; averaged: with the first one's running average."""
    sizes = [_numbers(model) for model in models]
    weight = 2 if config.dtype == "bf16" else 4
    adam = 8 if config.zero_stage == 0 else 12  # two moments; ZeRO keeps fp32 weights beside the model's
    return (weight + adam) * sum(sizes) + (4 * sizes[0] if averaged else 0)


def _numbers(model: nn.Module) -> int:
    """Numbers that training changes: of a model with an adapter, those of the adapter."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def _bytes_in(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _unused(path: Path) -> Path:
    """The path, or with a number behind it where something is there."""
    names = (path.with_name(f"{path.name}-{i}") for i in itertools.count(1))
    return path if not path.exists() else next(p for p in names if not p.exists())


def _of_a_run(path: Path) -> bool:
    """Whether a run wrote this; a log may lie in a new run's folder."""
    return path.suffix != ".log" and path.name not in (LOCK, OWNER)


def open_output(config: RunConfig) -> Checkpoints:
    """The run's checkpoints; ConfigError where the folder holds a run that is not to be resumed. Writes nothing.

    Call it inside `output_lock.locked`.
    """
    check_wandb(config.wandb_project)
    folder = Path(config.output_dir)
    if config.resume == "never" and folder.is_dir() and any(map(_of_a_run, folder.iterdir())):
        raise ConfigError(f"output_dir: {folder} already holds a run; pass --resume auto to go on with it, or another "
                          "--output-dir")  # fmt: skip
    if config.resume == "auto" and not checkpoint_steps(folder / CHECKPOINTS):
        done = [
            name
            for name in ("policy", "model")
            if any((folder / name / file).exists() for file in ("config.json", ADAPTER))
        ]
        require(
            not done,
            f"resume: {folder} holds a finished run ({' and '.join(done)}) that kept no checkpoint: there is nothing "
            "to go on from; pass another --output-dir",
        )
    distributed.barrier()
    return Checkpoints(config)
