"""What a reward source is asked: one score for each whole response.

A source passes NaN and infinity on: the trainer counts them and skips the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from rto_fast.contract import ResponseTexts, Rollout

Model = Callable[..., Tensor]
"""A model as the scorer calls it: a bare module, or a DeepSpeed engine around one."""


class RewardSource(Protocol):
    """Scores each response as a whole."""

    name: str

    def score(self, rollout: Rollout, texts: ResponseTexts) -> Tensor:
        """[B] fp32 on the CPU; may hold NaN or infinity. Raises RewardError when there is no score."""
        ...
