"""One run at a time in an output folder."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from rto_fast import distributed
from rto_fast.config import RunConfig
from rto_fast.errors import ConfigError, require

LOCK, OWNER = ".lock", ".lock-owner"
R = TypeVar("R")


def alone(train: Callable[..., R]) -> Callable[..., R]:
    """A stage that holds its output folder's lock while it runs; its first argument is the config."""

    @functools.wraps(train)
    def run(config: RunConfig, *args: Any, **kwargs: Any) -> R:
        config.validate()
        distributed.init()
        with locked(Path(config.output_dir)):
            return train(config, *args, **kwargs)

    return run


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock on rank 0; collective.

    Raises ConfigError on every rank where another process has it, or where no folder can be made. The system drops
    the lock of a process that has died. A folder that holds nothing else afterwards is deleted, if it was made here.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    require(there.is_dir(), f"output_dir: {there} is a file")
    require(os.access(there, os.W_OK | os.X_OK), f"output_dir: no permission to write in {there}")
    lock, refusal = FileLock(folder / LOCK, blocking=False), ""
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    distributed.barrier()
    if distributed.rank() == 0:
        refusal = _take(lock, folder)
    if refusal := distributed.broadcast_object(refusal):
        raise ConfigError(refusal)
    try:
        yield
    finally:
        if distributed.rank() == 0:
            for name in (OWNER, LOCK):
                (folder / name).unlink(missing_ok=True)
            lock.release()
            for empty in made:
                with contextlib.suppress(OSError):
                    empty.rmdir()


def _take(lock: FileLock, folder: Path) -> str:
    """Takes the lock and signs it; else why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        (folder / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    except Timeout:
        with contextlib.suppress(OSError):
            return (
                f"output_dir: {folder} is in use by {(folder / OWNER).read_text().strip()}; pass another --output-dir"
            )
        return f"output_dir: {folder} is in use by another process; pass another --output-dir"
    except OSError as error:
        return f"output_dir: {folder} cannot be written: {error.strerror or error}"
    return ""
