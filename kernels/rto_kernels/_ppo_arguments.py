"""What the PPO losses are computed from and how, as objects: ppo_loss.py, gae_ppo_loss.py and linear_ppo.py share them.

A custom op's arguments can only be flat, so each object is a tuple of them, in the op's order.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

INF = float("inf")
# The cap of importance weights that have none: a finite weight times a zero advantage is 0.
UNCAPPED = torch.finfo(torch.float32).max

Clip = float | tuple[float | None, float | None] | None


class Tokens(NamedTuple):
    """Numbers of each token: [B, T], or packed [N]."""

    logp: Tensor
    old_logp: Tensor
    advantages: Tensor
    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    entropy: Tensor | None = None
    sampler_logp: Tensor | None = None


class Whitening(NamedTuple):
    """Of the advantages: (mean, rstd), or moments [R, 3] that are still to be merged, or neither."""

    mean: Tensor | None = None
    rstd: Tensor | None = None
    moments: Tensor | None = None
    correction: int = 0  # of the variance of the moments


class Batch(NamedTuple):
    """Where sequences lie, which tokens count, and the count that the mean divides by (None: this batch's)."""

    cu_seqlens: Tensor | None  # [B + 1]
    mask: Tensor | None  # shaped as the tokens
    denominator: Tensor | None  # one number


class Settings(NamedTuple):
    """Options as the kernels take them: a bound or a cap that is off is too large to matter."""

    clip_low: float
    clip_high: float
    value_clip: float
    is_cap: float
    entropy_coef: float
    aggregation: str


@dataclass(frozen=True)
class PPOOptions:
    """Options as a caller gives them; see `ppo_loss`."""

    clip: Clip
    value_clip: float | None
    is_cap: float | None
    entropy_coef: float
    aggregation: str

    def flat(self) -> Settings:
        """Raises ValueError for a negative bound."""
        value_clip, _ = bounds("value_clip", self.value_clip)
        is_cap = float(self.is_cap or UNCAPPED)
        return Settings(*bounds("clip", self.clip), value_clip, is_cap, float(self.entropy_coef), self.aggregation)


def bounds(name: str, clip: Clip) -> tuple[float, float]:
    low, high = clip if isinstance(clip, tuple | list) else (clip, clip)
    if any(bound is not None and bound < 0 for bound in (low, high)):
        raise ValueError(f"{name} must not be negative, got {clip!r}")
    return float(low or INF), float(high or INF)
