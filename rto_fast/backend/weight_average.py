"""A moving average of the policy's weights.

Kept in fp32 on the CPU of rank 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, once an iteration; decay 0 keeps nothing."""

    def __init__(self, decay: float, *, holds: bool) -> None:
        """holds: whether this rank keeps the average (the others only take part in the gathering)."""
        self.decay, self.holds = decay, holds
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """weights: (checkpoint name, full tensor); the first call copies them."""
        for name, tensor in weights:
            if not self.holds:
                continue
            new = tensor.to("cpu", torch.float32)
            if name in self.weights:
                self.weights[name].lerp_(new, 1 - self.decay)
            else:
                self.weights[name] = new.clone()

    def load(self, weights: dict[str, Tensor]) -> None:
        """A copy of the average that a checkpoint holds, where this rank keeps it."""
        if self.holds:
            self.weights = {name: tensor.clone() for name, tensor in weights.items()}
