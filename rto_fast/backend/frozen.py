"""Models for scoring only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rto_fast import distributed
from rto_fast.backend.train_engine import deepspeed_config
from rto_fast.config import RunConfig


class FrozenModel:
    """A model for scoring only. With `parks` it waits in host memory until `fetch`, and again after `park`."""

    def __init__(self, module: Callable[..., Any], device: torch.device, *, parks: bool) -> None:
        self.module, self.device, self.parks = module, device, parks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def fetch(self) -> None:
        if self.parks:
            self.module.to(self.device)

    def park(self) -> None:
        if self.parks:
            self.module.to("cpu")


def frozen(model: torch.nn.Module, config: RunConfig, *, parks: bool = False) -> FrozenModel:
    """A model for scoring only; partitioned over ranks under ZeRO-3, else whole on the device (or parked)."""
    model.eval().requires_grad_(False)
    device = distributed.device()
    if config.zero_stage == 3:
        import deepspeed

        settings = {k: v for k, v in deepspeed_config(config).items() if k != "gradient_clipping"}
        settings["zero_optimization"] = {"stage": 3}
        distributed.barrier()  # see TrainEngine
        engine = deepspeed.initialize(model=model, config=settings)[0]
        engine.eval()
        return FrozenModel(engine, device, parks=False)
    return FrozenModel(model if parks else model.to(device), device, parks=parks)
