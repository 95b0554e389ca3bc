"""A colocated vLLM engine on one device, step by step: push, generate, sleep, wake, push while asleep, and again.

    python -m bench.iteration.vllm_engine --shape llama-1b     writes run/vllm of bench/results/<device>.json

Weights are random, and the response lengths those of measure.py. The log-probs of what vLLM sampled are compared with
the policy's own. `generate` counts response tokens; the rates stand beside the transformers engine's in measure.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.harness import ON_GPU, RUN, clocks, commit, save, versions
from bench.iteration.workload import (
    MISSING,
    PAD,
    SHAPES,
    STOP,
    Clock,
    Shape,
    config_of,
    draw,
    random_model,
    vllm_lengths,
)  # fmt: skip

if not MISSING:
    from transformers import AutoModelForCausalLM

    from rto_fast import distributed
    from rto_fast.models.attention import resolve_attention
    from rto_fast.models.load import DTYPES
    from rto_fast.models.packing import PackedBatch
    from rto_fast.models.save import export, full_parameters
    from rto_fast.rollout.engine import Sampling
    from rto_fast.rollout.make_engine import make_engine
    from rto_fast.rollout.vllm_engines.support import unusable


def held_gb() -> float | None:
    """Gigabytes of the device that are in use, by whatever process."""
    if not ON_GPU:
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e9


def logprob_difference(policy: Any, rollout: Any, kernel: str, device: torch.device, count: int = 16) -> dict:
    """|vLLM's log-prob − the policy's| of the first sequences' response tokens: median and largest."""
    part = rollout.select(range(min(count, len(rollout))))
    sequences = [torch.cat(pair) for pair in zip(part.prompts(), part.responses(), strict=True)]
    batch = PackedBatch.make(sequences, [len(p) for p in part.prompts()], device, kernel)
    with torch.no_grad():
        own = policy(batch).float().cpu()
    apart = (own - part.sampler_logp.float()).abs()
    return {"median": float(apart.median()), "largest": float(apart.max()), "tokens": len(apart)}


def measure(shape: Shape, folder: Path) -> dict[str, Any]:
    """Every step once to warm up on four sequences, then twice in full; saved after each."""
    device, config = distributed.init(), config_of(shape, rollout_engine="vllm")
    dtype = DTYPES[shape.dtype]
    attention, kernel = resolve_attention("auto", device, dtype)
    policy = random_model(AutoModelForCausalLM, shape, 1, attention, device).requires_grad_(False)
    export(policy, folder, write=True)
    record: dict[str, Any] = {
        "shape": asdict(shape), "commit": commit(), "versions": versions(), "clocks": clocks(), "held_gb": {},
    }  # fmt: skip
    if reason := unusable(folder, device):
        sys.exit(f"not run: {reason}")
    start = Clock()
    with start.phase("start", 0):
        engine = make_engine(config, folder, device, dtype, PAD)
    record["start_s"] = start.record()["start"]["seconds"]
    requests, lengths = draw(shape)
    sampling, clock = Sampling(shape.response, 1.0, (STOP,)), Clock()

    def keep(step: str) -> None:
        record["held_gb"][step] = held_gb()
        record["phases"] = clock.record()
        save(RUN, "vllm", record)

    for repeat, (asked, ends) in enumerate(((requests[:4], lengths[:4]), (requests, lengths), (requests, lengths))):
        if repeat == 1:
            clock = Clock()  # what came before has warmed up
        with clock.phase("push", 0):
            moved = engine.push(full_parameters(policy), version=repeat + 1)
        record["push"] = {"bytes": moved.bytes, "bytes_per_s": moved.bytes / moved.seconds, "tensors": moved.tensors}
        keep("push")
        with clock.phase("wake", 0):
            engine.wake()
        keep("wake")
        with vllm_lengths(asked, ends), clock.phase("generate", sum(ends)):
            rollout = engine.generate(asked, sampling)
        assert rollout.response_lens.tolist() == list(ends)
        keep("generate")
        with clock.phase("sleep", 0):
            engine.sleep()
        keep("sleep")
    record["log-probs apart"] = logprob_difference(policy, rollout, kernel, device)
    keep("end")
    engine.close()
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    args = parser.parse_args()
    if MISSING:
        sys.exit(f"not run: {MISSING}")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(SHAPES[args.shape], Path(folder)), indent=1))


if __name__ == "__main__":
    main()
