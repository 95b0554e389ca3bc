"""Mixtures of experts under ZeRO-3 on these ranks: losses, weights and auxiliary losses of a few steps of SFT.

python experts_worker.py FOLDER OUT FAMILY...    # FOLDER: of tiny models; OUT: a file that rank 0 writes
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rto_fast import distributed
from rto_fast.backend.train_engine import TrainEngine
from rto_fast.config import SFTConfig
from rto_fast.logs.run_logger import RunLogger
from rto_fast.models.load import load_policy, place
from rto_fast.models.router import watch_router
from rto_fast.supervised.loop import train_step
from rto_fast.supervised.sft import SFT
from rto_fast.supervised.stage import Row

STEPS = 3
WITH_AUX = ("mixtral", "gpt_oss", "dbrx")
"""Families that are trained with their auxiliary loss too."""
ROWS = [Row([3, 4], ([token] * length,)) for token, length in ((5, 9), (6, 9), (7, 4), (8, 4), (9, 4))]
"""Each of one token, so that a rank's tokens reach few experts."""


def experts_seen(model: nn.Module) -> dict[str, set[int]]:
    """Fills a dict with the experts that each router of the model sends tokens to in its first training forward."""
    seen: dict[str, set[int]] = {}

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: Any, out: Any) -> None:
            parts = out if isinstance(out, tuple) else (out,)
            tensors = [x for x in parts if torch.is_tensor(x) and x.is_floating_point() and x.ndim > 1]
            scores = max(tensors, key=lambda x: x.shape[-1])  # of all experts, not of the chosen ones
            if model.training:
                seen.setdefault(name, set(scores.flatten(0, -2).topk(2).indices.flatten().tolist()))

        return look

    for name, module in model.named_modules():
        if "Router" in type(module).__name__ or "Gating" in type(module).__name__:
            module.register_forward_hook(hook(name))
    return seen


def trained(folder: Path, output: Path, coefficient: float) -> dict[str, Any]:
    """What a family's SFT came to, and the experts that each rank's tokens went to first, by router."""
    config = SFTConfig(
        model=str(folder), data="none", output_dir=str(output), dtype="fp32", zero_stage=3, batch=len(ROWS), lr=1e-2,
        micro_tokens=64, gradient_checkpointing=False, warmup_ratio=0.0, router_aux_coef=coefficient,
    )  # fmt: skip
    placement, loading = place(config, distributed.device(), config.micro_tokens, 16)
    model = load_policy(str(folder), argument="model", **loading)
    seen = experts_seen(model)
    stage = SFT(model, ROWS, [])
    watch_router(model, coefficient)
    engine = TrainEngine(model, config, peak_lr=config.lr, total_steps=STEPS)
    logger = RunLogger(output, stage="SFT", total_steps=STEPS, rank=distributed.rank(), config={})
    steps = []
    with logger, logger.phase("train"):
        for step in range(STEPS):
            metrics, applied = train_step(config, stage, engine, placement, logger, step)
            assert applied
            steps.append(metrics)
    weights = {name: tensor.clone() for name, tensor in engine.weights()}
    return {"steps": steps, "weights": weights, "experts": distributed.gather_objects(seen)}


def main() -> None:
    distributed.init()
    torch.set_num_threads(1)
    found = {}
    for folder in (Path(sys.argv[1]) / name for name in sys.argv[3:]):
        for coefficient in (0.0, 0.1) if folder.name in WITH_AUX else (0.0,):
            with tempfile.TemporaryDirectory() as output:
                root = Path(distributed.broadcast_object(output))
                print(folder.name, coefficient, flush=True)
                found[folder.name, coefficient] = trained(folder, root / "run", coefficient)
                distributed.barrier()
    if distributed.rank() == 0:
        torch.save(found, sys.argv[2])


if __name__ == "__main__":
    main()
