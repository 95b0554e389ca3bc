"""How far quantised frozen models are from whole ones, in token rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rto_fast.backend.frozen import FrozenModel
from rto_fast.config import RTOConfig
from rto_fast.contract import ResponseTexts, Rollout, Scores
from rto_fast.models.packing import Placement
from rto_fast.scoring.reward_model import ModelReward
from rto_fast.scoring.score import Scorers, score_rollout
from rto_fast.scoring.token_function import TokenFunction, TokenServer

MEASURED = 64
"""Responses that are compared."""


def frozen_error(
    rollout: Rollout, texts: ResponseTexts, scorers: Scorers, config: RTOConfig, placement: Placement
) -> dict[str, float]:
    """Mean and largest |difference| of what the quantised models say and what they say whole; collective.

    frozen/token_reward_*: of a token's reward before its scale (dpo: log(pi_dpo / pi_ref), nats), of all sources that
    are models; frozen/ref_logp_*: of the reference's log-prob (nats); frozen/score_*: of reward models' scores. {}
    where nothing is quantised. Whole models are loaded again, one at a time.
    """
    if not any(model.whole for model in scorers.frozen):
        return {}
    own = [source for source in scorers.rewards if isinstance(source, ModelReward)]
    models = replace(
        scorers, critic=None, rewards=own, reward_weights=[1.0] * len(own),
        tokens=[source for source in scorers.tokens if not isinstance(source, TokenFunction | TokenServer)],
    )  # fmt: skip

    def said() -> tuple[Scores, dict[str, Tensor]]:
        return score_rollout(rollout, texts, models, config, placement, lambda _: None)

    scores, named = said()
    with _whole(scorers.frozen):
        wanted, expected = said()
    gaps = {"ref_logp": [scores.ref_logp - wanted.ref_logp]}
    rewards = [_reward(scores) - _reward(wanted)] if scorers.dpo else []
    rewards += [scores.tokens - wanted.tokens] if models.tokens else []
    gaps |= {"token_reward": rewards, "score": [named[name] - expected[name] for name in named]}
    out: dict[str, float] = {}
    for name, parts in gaps.items():
        gap = torch.cat([part.flatten().abs().double().cpu() for part in parts]) if parts else torch.zeros(0)
        if gap.numel():
            out |= {f"frozen/{name}_error_mean": float(gap.mean()), f"frozen/{name}_error_max": float(gap.max())}
    return out


def said_of(config: RTOConfig, error: dict[str, float], responses: int) -> str:
    """The figures as a sentence for the log."""
    names = {"token_reward": "token rewards by {} nat", "ref_logp": "the reference's log-probs by {} nat",
             "score": "scores by {}"}  # fmt: skip
    found = [
        text.format(f"{error[f'frozen/{name}_error_mean']:.2g} in the mean, {error[f'frozen/{name}_error_max']:.2g}")
        for name, text in names.items()
        if f"frozen/{name}_error_mean" in error
    ]
    kinds = " or ".join(dict.fromkeys(k for k in (config.frozen_dtype, config.lora_base_dtype) if k != "off"))
    if not found:
        return f"frozen models in {kinds}: none, since all stand on the policy's base"
    bound = config.dpo_clip / config.beta1 if config.beta1 else 0.0
    against = (
        f"; a token reward is bounded by {bound:.2g}" if bound and "frozen/token_reward_error_mean" in error else ""
    )
    return (
        f"frozen models in {kinds} against {config.dtype}, {responses} responses: {', '.join(found)} at most{against}"
    )


def _reward(scores: Scores) -> Tensor:
    """[R] log(pi_dpo / pi_ref), nats."""
    return scores.dpo_logp - scores.dpo_ref_logp


@contextmanager
def _whole(models: Sequence[FrozenModel]) -> Iterator[None]:
    """Inside, quantised models answer with whole weights."""
    kept, shelf = [(model, model.module) for model in models if model.whole], _Shelf()
    try:
        for model, _ in kept:
            model.module = shelf.place(model.whole)
        yield
    finally:
        for model, module in kept:
            model.module = module


class _Shelf:
    """Holds one loaded model at a time."""

    def __init__(self) -> None:
        self.load: Any = None
        self.model: Any = None

    def place(self, load: Any) -> Callable[..., Any]:
        """A function that answers as the model that `load` gives."""

        def answer(*args: Any, **kwargs: Any) -> Any:
            if self.load is not load:
                self.model = None  # before the next one is there
                self.load, self.model = load, load()
            return self.model(*args, **kwargs)

        return answer
