"""What a reward source is asked: one score for each whole response.

A source passes NaN and infinity on: the trainer counts them and skips the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from rto_fast import distributed
from rto_fast.contract import ResponseTexts, Rollout
from rto_fast.errors import ConfigError, RewardError

Model = Callable[..., Tensor]
"""A model as the scorer calls it: a bare module, or a DeepSpeed engine around one."""


class RewardSource(Protocol):
    """Scores each response as a whole."""

    name: str

    def score(self, rollout: Rollout, texts: ResponseTexts) -> Tensor:
        """[B] fp32 on the CPU; may hold NaN or infinity. Raises RewardError when there is no score."""
        ...


@runtime_checkable
class TextSource(RewardSource, Protocol):
    """One that reads texts alone, so that it can be tried before there is a rollout."""

    setting: str
    """Where the user named it."""

    def score_texts(self, texts: ResponseTexts) -> Tensor:
        """As `score`."""
        ...


@runtime_checkable
class MetricSource(RewardSource, Protocol):
    """One that may say more of a response than its score."""

    def judge(self, texts: ResponseTexts) -> tuple[Tensor, list[dict[str, float]]]:
        """(scores as `score`, metrics of each response)."""
        ...


TRIAL = "A response."
"""What a source is tried on before a run."""
TRIED = 2
"""Prompts that it answers there."""


def try_sources(sources: Sequence[RewardSource], texts: ResponseTexts) -> None:
    """Has rank 0 ask each function and server for scores of made-up responses; collective.

    Raises ConfigError, before any model is loaded, where one fails or answers otherwise than with numbers.
    """
    failure = ""
    for source in sources if distributed.rank() == 0 else ():
        if isinstance(source, TextSource) and not failure:
            try:
                source.score_texts(texts)
            except RewardError as error:
                failure = f"{source.setting}: tried on the response {TRIAL!r}: {error}"
    if failure := distributed.broadcast_object(failure):
        raise ConfigError(failure)
