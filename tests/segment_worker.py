"""Entropies and paid rewards of a fixed rollout under `--credit segment`, on this number of ranks.

python segment_worker.py MODELS OUT        # MODELS: a JSON dict of paths; OUT: a file that rank 0 writes
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from loop_helpers import TinyModels, small_run

from rto_fast import build, distributed
from rto_fast.config import RTOConfig
from rto_fast.contract import Request, Rollout
from rto_fast.scoring.score import score_rollout
from rto_fast.trainer import compute_targets

RESPONSES = (5, 0, 1, 12, 3)
CUT = 2.5


def rollout() -> Rollout:
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randint(4, 87, (n,), generator=generator).tolist() for n in RESPONSES]
    prompts = [tuple(torch.randint(4, 87, (n,), generator=generator).tolist()) for n in (1, 4, 2, 3, 7)]
    requests = [Request(p, i, i, 0, i) for i, p in enumerate(prompts)]
    truncated = [False, True, False, True, False]
    return Rollout.from_lists(requests, draw, [[-1.0] * n for n in RESPONSES], truncated, version=0)


def scored(models: TinyModels, folder: Path, **settings):
    """(config, scores, targets) of the fixed rollout in a run with these settings."""
    cut = {"segment_entropy": CUT} if settings.get("credit") == "segment" else {}
    config = RTOConfig(**small_run(models, folder, score_tokens=24, **cut, **settings))
    run = build.build(config)
    drawn = rollout()
    scores, _ = score_rollout(drawn, run.texts(drawn), run.scorers, config, run.placement, lambda n: None)
    run.logger.close()
    return config, scores, compute_targets(drawn, scores, config, config.beta2)


def main(models: str, out: str) -> None:
    distributed.init()
    folder = Path(tempfile.mkdtemp() if distributed.rank() == 0 else "/")
    folder = Path(distributed.broadcast_object(str(folder)))
    _, scores, targets = scored(TinyModels(**json.loads(models)), folder / "run", credit="segment", zero_stage=3)
    if distributed.rank() == 0:
        torch.save((scores.entropy, targets.dense, targets.rewards), out)
    distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
