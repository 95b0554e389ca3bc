"""Compile the kernels of one lm_head and of its candidate tiles by a pool of processes, before anything is timed.

    python -m bench.kernels.compile_ahead --minutes 3     writes run/compiled of bench/results/<device>.json

A process runs a pass on a few tokens under one candidate: the kernels do not depend on their number, so that Triton's
cache on disk then holds what the benches and the tuner launch. The tiles in use come first, then each neighbour that
the tuner would try. A candidate that does not compile or fit is named, and costs the tuner no time later.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

import torch
from rto_kernels import tiles, tune
from rto_kernels.linear_forward import tiles_of
from rto_kernels.tiles import Tiles

from bench.harness import DEVICE, ON_GPU, RUN, resumed, save, source

TOKENS = 256
PROCESSES = min(12, os.cpu_count() or 1)
"""Each holds a weight of a gigabyte and its gradient on the device."""


class Problem(NamedTuple):
    hidden: int
    vocab: int
    dtype: str

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        random, dtype = source(), getattr(torch, self.dtype)
        tokens = TOKENS if ON_GPU else 8
        h = torch.randn(tokens, self.hidden, **random).to(dtype)
        w = (torch.randn(self.vocab, self.hidden, **random) * 2 / self.hidden**0.5).to(dtype)
        return h, w, torch.randint(self.vocab, (tokens,), **random)


class Candidate(NamedTuple):
    role: str  # field of Tiles
    choice: Tiles

    @property
    def name(self) -> str:
        tile = getattr(self.choice, self.role)
        return f"{self.role} {tile.rows}×{tile.columns}×{tile.depth} w{tile.warps} s{tile.stages} p{tile.parts}"


def candidates(used: Tiles) -> list[Candidate]:
    """The tiles in use, then every neighbour of each, in the order that the tuner meets them."""
    found = [Candidate(role, used) for role in Tiles._fields]
    for role in Tiles._fields:
        for tile in tune.neighbours(getattr(used, role)):
            choice = used._replace(**{role: tile})
            if tune.allowed(choice):
                found.append(Candidate(role, choice))
    return found


_jobs: dict[Problem, dict[str, tune.Job]] = {}


def compile_one(problem: Problem, candidate: Candidate) -> dict:
    """Seconds of the pass with its compilation, or why there are none."""
    torch.set_num_threads(1)
    if problem not in _jobs:
        _jobs[problem] = tune.jobs(*problem.tensors())
    start = time.perf_counter()
    try:
        with tiles.trying(candidate.choice):
            _jobs[problem][candidate.role]()
        if ON_GPU:
            torch.cuda.synchronize()
    except Exception as error:  # a compiler may fail in any way
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return {"seconds": round(time.perf_counter() - start, 2)}


def compile_all(problem: Problem, found: dict, minutes: float, processes: int, most: int | None = None) -> list[str]:
    """Fill `found` by candidate, saved as it goes; the names of those that there were no minutes for."""
    end = time.monotonic() + 60 * minutes
    hidden = torch.empty(1, problem.hidden, dtype=getattr(torch, problem.dtype), device=DEVICE)
    wanted = [c for c in candidates(tiles_of(hidden, problem.vocab)[1])[:most] if c.name not in found]
    # A CUDA context does not survive a fork.
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    futures = {pool.submit(compile_one, problem, c): c.name for c in wanted}
    try:
        for future in as_completed(futures, timeout=max(0.0, end - time.monotonic())):
            found[futures[future]] = future.result()
            save(RUN, "compiled", found)
    except TimeoutError:
        pass
    left = [name for name in futures.values() if name not in found]
    workers = list(pool._processes.values())
    pool.shutdown(wait=not left, cancel_futures=True)
    for worker in workers if left else ():
        worker.kill()
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--most", type=int, help="only the first candidates")
    args = parser.parse_args()
    found = dict(resumed("compiled"))
    problem = Problem(args.hidden, args.vocab, args.dtype)
    left = compile_all(problem, found, args.minutes, args.processes, args.most)
    failed = [name for name, record in found.items() if "failed" in record]
    print(f"{len(found) - len(failed)} candidates compiled, {len(failed)} cannot be, {len(left)} left", flush=True)
    # What is left compiles when it is timed: no reason to come back.


if __name__ == "__main__":
    main()
