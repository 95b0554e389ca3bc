"""Resident memory of a small run in each phase, beside what the arithmetic says of it.

python memory_worker.py TINY CONFIG OUT       # JSON dicts of RTOConfig's fields; OUT: rank 0 writes JSON there

TINY runs first: it leaves behind what every run does, code and buffers of libraries, whatever its models' sizes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rto_fast import build, distributed, trainer
from rto_fast.config import RTOConfig
from rto_fast.memory.phases import Machine, models_of, phases
from rto_fast.updates.ppo import TrainBatch, UpdateStats

PHASE_NAMES = {"rollout": "rollout", "score": "scoring"}


def resident(kind: str) -> float:
    """Bytes of this process: VmRSS now, VmHWM at most since `forget_peak`."""
    text = Path("/proc/self/status").read_text()
    return 1024.0 * int(next(line for line in text.splitlines() if line.startswith(kind)).split()[1])


def forget_peak() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def parsed(text: str) -> RTOConfig:
    return RTOConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()})


def main() -> None:
    tiny, config = map(parsed, sys.argv[1:3])
    distributed.init()
    torch.set_num_threads(1)
    run = build.build(tiny)
    trainer.rto_iteration(run, 0)
    run.logger.close()
    del run
    forget_peak()
    start, peaks = resident("VmRSS"), {}

    @contextlib.contextmanager
    def measured(name: str) -> Iterator[None]:
        forget_peak()
        yield
        peaks[name] = resident("VmHWM") - start

    run = build.build(config)
    plain = run.logger.phase
    run.logger.phase = lambda name: both(measured(PHASE_NAMES.get(name, name)), plain(name))
    plain_update = TrainBatch.update_policy

    def update(batch: TrainBatch, step: int) -> UpdateStats[Any]:
        with measured("policy update"):
            return plain_update(batch, step)

    TrainBatch.update_policy = update
    for iteration in range(2):  # the second one finds AdamW's moments there
        trainer.rto_iteration(run, iteration)
    run.logger.close()
    machine = Machine(distributed.world_size(), device=0, reserve=0, kind="cpu")
    expected = {phase.name: phase.total for phase in phases(config, models_of(config), machine)}
    found = distributed.gather_objects({name: (peaks[name], expected[name]) for name in peaks if name in expected})
    if distributed.rank() == 0:
        Path(sys.argv[3]).write_text(json.dumps(found))


@contextlib.contextmanager
def both(*contexts: contextlib.AbstractContextManager[None]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


if __name__ == "__main__":
    main()
