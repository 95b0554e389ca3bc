"""The largest batch of a policy that fits the device, and a step with the optimiser on the host.

python -m bench.iteration.largest --minutes 5     writes run/largest_batch of bench/results/<device>.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.harness import ON_GPU, RUN, clocks, commit, save, versions
from bench.iteration.workload import MISSING, SHAPES, Clock, Minutes, Shape, attempt, config_of, freed, random_model

if not MISSING:
    from rto_fast import distributed
    from rto_fast.backend.train_engine import TrainEngine
    from rto_fast.models.attention import resolve_attention
    from rto_fast.models.load import DTYPES
    from rto_fast.models.packing import PackedBatch


def largest_batch(shape: Shape, minutes: float) -> dict[str, Any]:
    """Forward and backward of the policy with ever more tokens until memory ends; then a step with offload."""
    budget = Minutes(minutes)
    record: dict[str, Any] = {
        "shape": asdict(shape), "weights": "random", "commit": commit(), "versions": versions(), "clocks": clocks(),
        "forward and backward": {}, "not_run": {},
    }  # fmt: skip
    device = distributed.init()
    attention, kernel = resolve_attention("auto", device, DTYPES[shape.dtype])
    policy = random_model(AutoModelForCausalLM, shape, 1, attention, device)
    policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    record["parameters"] = sum(p.numel() for p in policy.parameters())
    length = shape.prompt[1] + shape.response
    count = 1
    while count <= 256:
        if budget.left < 20:
            record["not_run"][f"{count * length} tokens"] = "no minutes left"
            break
        clock = Clock()
        try:
            for _ in range(2):
                forward_and_backward(policy, shape, count, kernel, clock)
        except torch.OutOfMemoryError:
            record["not_run"][f"{count * length} tokens"] = "out of memory"
            break
        record["forward and backward"][str(count * length)] = clock.record()["step"]
        save(RUN, "largest_batch", record)
        count *= 2
        if not ON_GPU and count > 4:
            break
    parameters = record["parameters"]
    del policy
    freed()
    needed, there = 18 * parameters, host_memory()
    if needed > there:
        record["not_run"]["step with offload"] = (
            f"needs {needed / 1e9:.0f} GB of host memory, {there / 1e9:.0f} are free"
        )
    elif budget.left < 60 * (parameters > 1e9):
        record["not_run"]["step with offload"] = "no minutes left"
    else:
        attempt(record, "step with offload", lambda: offloaded_step(shape, record))
    save(RUN, "largest_batch", record)
    return record


def forward_and_backward(policy: Callable, shape: Shape, count: int, kernel: str, clock: Clock, backward=None) -> None:
    """`count` sequences of the longest prompt and response through ours, to a loss a token."""
    generator, device = torch.Generator().manual_seed(count), distributed.device()
    length = shape.prompt[1] + shape.response
    rows = torch.randint(2, shape.model["vocab_size"], (count, length), generator=generator)
    batch = PackedBatch.make(list(rows), [shape.prompt[1]] * count, device, kernel)
    with clock.phase("step", count * length):
        loss = policy(batch).mean()
        backward(loss) if backward else loss.backward()
    if backward is None:
        for p in policy.parameters():
            p.grad = None


def offloaded_step(shape: Shape, record: dict) -> None:
    device = distributed.device()
    attention, kernel = resolve_attention("auto", device, DTYPES[shape.dtype])
    model = random_model(AutoModelForCausalLM, shape, 1, attention, device)
    config = config_of(shape, offload=True)
    engine = TrainEngine(model, config, peak_lr=1e-9, total_steps=10)
    largest = max(map(int, record["forward and backward"]), default=0) // (shape.prompt[1] + shape.response)
    clock = Clock()
    generator = torch.Generator().manual_seed(0)
    length = shape.prompt[1] + shape.response
    rows = torch.randint(2, shape.model["vocab_size"], (largest, length), generator=generator)
    batch = PackedBatch.make(list(rows), [shape.prompt[1]] * largest, device, kernel)
    for _ in range(2):
        with clock.phase("step", largest * length):
            engine.update([batch], lambda b: engine(b).mean(), step=0)
    record["step with offload"] = clock.record()["step"]


def host_memory() -> int:
    """Bytes of host memory that are free for use."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--minutes", type=float, default=5)
    args = parser.parse_args()
    if MISSING:
        sys.exit(f"not run: {MISSING}")
    print(json.dumps(largest_batch(SHAPES[args.shape], args.minutes), indent=1))


if __name__ == "__main__":
    main()
