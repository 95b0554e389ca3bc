"""Scripts on several ranks of this machine, each rank a fork of one process that has imported everything.

A cold start imports torch, transformers and DeepSpeed for nine seconds; a fork starts at once. What a rank runs and
how it ends is as under `python`; `recipe_helpers.run_deepspeed` starts recipes cold, by DeepSpeed's launcher.
"""

from __future__ import annotations

import atexit
import functools
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from loop_helpers import ROOT

RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which a process finds its ranks."""
IMPORTED = [
    "rto_fast.demo.pipeline", "rto_fast.generate", "rto_fast.trainer", "rto_fast.rollout.transformers_engine",
    "rto_fast.supervised.dpo", "rto_fast.supervised.reward_model", "rto_fast.supervised.sft",
    # What a run imports late.
    "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.zero.stage3", "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    # Where it is installed.
    "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker",
]  # fmt: skip

START = """
import sys
from pathlib import Path
from launches import Launch

ranks, *args = sys.argv[1:]
result = Launch(args, ranks=int(ranks), log=Path(args[-1]).with_name("log")).wait()
print(result.output)
sys.exit(result.returncode)
"""
"""A program for `python -c`: ranks, then a script and its arguments. What a process reads once, as malloc its settings,
the ranks then read at its start."""


def environment() -> dict[str, str]:
    """This process's environment for a start of its own: on CPUs, offline, with the repository's packages."""
    path = [ROOT / "kernels", ROOT, ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    return {k: v for k, v in os.environ.items() if k not in RENDEZVOUS} | {
        "PYTHONPATH": os.pathsep.join(str(p) for p in path if str(p)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rendezvous(rank: int, ranks: int, port: int) -> dict[str, str]:
    values = (rank, rank, ranks, ranks, "127.0.0.1", port)
    return {name: str(value) for name, value in zip(RENDEZVOUS, values, strict=True)}


@functools.cache
def forks() -> ForkServerContext:
    """Makes processes that are forks of a warm one; it starts at the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, environment(), clear=True):
        forkserver.ensure_running()
    return context


@dataclass(frozen=True)
class Result:
    """What a launch left behind."""

    returncode: int
    """That of the first rank that failed (negative: killed by that signal), else 0."""
    output: str
    """stdout and stderr of all ranks, as they came."""


def start_ranks(ranks: int, log: Path, run: Callable[..., None], *args: Any) -> list[ForkServerProcess]:
    """`run(*args)` on each rank: a fork in a session of its own, whose output goes to the end of `log`."""
    port = free_port()
    env = [environment() | rendezvous(rank, ranks, port) for rank in range(ranks)]
    processes = [forks().Process(target=_be_rank, args=(e, log, run, args)) for e in env]
    for process in processes:
        process.start()
    return processes


def _be_rank(env: dict[str, str], log: Path, run: Callable[..., None], args: tuple[Any, ...]) -> None:
    gc.freeze()  # what was imported lives for ever, and ZeRO-3 collects garbage for every engine
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for fd in (1, 2):
        os.dup2(sink, fd)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), "w", buffering=1) for fd in (1, 2))
    run(*args)


def _python(args: list[str]) -> None:
    """`python args`."""
    os.chdir(ROOT)
    try:
        if args[0] == "-m":
            sys.argv = args[1:]
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = args
            sys.path.insert(0, str(Path(args[0]).parent))
            runpy.run_path(args[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a fork's own end would leave them out


class Launch:
    """`python args` on `ranks` ranks over gloo, each in a session of its own; ended when one of them fails."""

    def __init__(self, args: Sequence[str | Path], *, ranks: int, log: Path) -> None:
        self.log = log
        self.log.touch()
        self.processes = start_ranks(ranks, log, _python, [*map(str, args)])

    def wait(self, timeout_s: float = 300) -> Result:
        """Until all ranks have ended, or one has failed (the others get a few seconds); kills at the time limit."""
        deadline, failed = time.monotonic() + timeout_s, 0
        while any(p.is_alive() for p in self.processes):
            if not failed and any(codes := [p.exitcode for p in self.processes]):
                failed = next(c for c in codes if c)
                deadline = min(deadline, time.monotonic() + 10)
            if time.monotonic() > deadline:
                self.kill()
                if not failed:
                    raise TimeoutError(f"no end after {timeout_s:g} s:\n{self.output()}")
            time.sleep(0.05)
        failed = failed or next((p.exitcode for p in self.processes if p.exitcode), 0)
        return Result(failed, self.output())

    def kill(self) -> None:
        """SIGKILL to every rank and what it started."""
        for process in self.processes:
            if process.is_alive():
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:  # it has no session yet
                    process.kill()
        for process in self.processes:
            process.join()

    def output(self) -> str:
        return self.log.read_text(errors="replace")
