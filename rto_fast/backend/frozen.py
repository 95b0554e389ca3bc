"""Models for scoring only: whole, spread over the ranks, or waiting on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rto_fast import distributed
from rto_fast.backend.spread import spread
from rto_fast.backend.train_engine import deepspeed_config, gather_experts_together
from rto_fast.config import RTOConfig, RunConfig
from rto_fast.models.quantised import matrices


class FrozenModel:
    """A model for scoring only. With `parks` it waits in host memory until `fetch`, and again after `park`."""

    def __init__(self, module: Callable[..., Any], device: torch.device, *, parks: bool) -> None:
        self.module, self.device = module, device
        self.whole: Callable[[], Callable[..., Any]] | None = None
        """Loads a quantised model's original again; None for a model that is none."""
        self.host = _host_copy(module, device) if parks and isinstance(module, nn.Module) else []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def fetch(self) -> None:
        """Copies the weights to the device; those in host memory stay there, since they never change."""
        for tensor, there in self.host:
            tensor.data = there.to(self.device, non_blocking=True)

    def park(self) -> None:
        """Frees the device of the weights; nothing is copied."""
        for tensor, there in self.host:
            tensor.data = there


def _host_copy(module: nn.Module, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(each parameter and buffer, what it holds in host memory), that pinned where the device is a GPU."""
    found = []
    for tensor in [*module.parameters(), *module.buffers()]:
        host = tensor.data.cpu()
        tensor.data = host.pin_memory() if device.type == "cuda" else host
        found.append((tensor, tensor.data))
    return found


class LentLinear(nn.Module):
    """A linear map that waits on the host and comes to its input's device for the product alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach()
        self.host = (linear.weight.detach(), bias)  # a tuple, which no `to` reaches

    def forward(self, hidden: Tensor) -> Tensor:
        weight, bias = self.host
        return F.linear(hidden, weight.to(hidden.device), None if bias is None else bias.to(hidden.device))


def lent(model: Any, device: torch.device) -> FrozenModel:
    """A model (a PolicyModel or ScalarModel) in host memory for a few forwards on a device.

    Of its linear maps the device holds one at a time; embeddings, norms and head stay there.
    """
    for name, linear in matrices(model.inner).items():
        model.inner.set_submodule(name, LentLinear(linear))
    return FrozenModel(model.eval().requires_grad_(False).to(device), device, parks=False)


def partitions(config: RTOConfig, ranks: int, kind: str) -> bool:
    """Whether a run on so many devices of a kind (cuda, cpu) spreads its frozen models over them."""
    if config.partition_frozen != "auto":
        return config.partition_frozen == "yes"
    whole = config.park_frozen or config.frozen_dtype != "off"
    return config.zero_stage == 3 or (ranks > 1 and kind == "cuda" and not whole)


def frozen(model: nn.Module, config: RunConfig, *, parks: bool = False, partitioned: bool | None = None) -> FrozenModel:
    """A model for scoring only, in evaluation mode and without gradients.

    partitioned: spread over the ranks, which must then all call it equally often; None = under ZeRO-3. Else it is whole
    on the device, or parks.
    """
    model.eval().requires_grad_(False)
    device = distributed.device()
    if config.zero_stage == 3 if partitioned is None else partitioned:
        import deepspeed

        settings = {k: v for k, v in deepspeed_config(config).items() if k != "gradient_clipping"}
        settings["zero_optimization"] = {"stage": 3}
        distributed.barrier()  # see TrainEngine
        gather_experts_together(model)
        spread(model, settings)
        engine = deepspeed.initialize(model=model, config=settings)[0]
        distributed.wait_as_long_everywhere()
        engine.eval()
        return FrozenModel(engine, device, parks=False)
    return FrozenModel(model if parks else model.to(device), device, parks=parks)
