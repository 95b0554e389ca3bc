"""From scores to token rewards, advantages and returns.

Nothing else in the trainer does arithmetic on rewards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import rto_kernels
import torch
from torch import Tensor

from rto_fast.algo.advantages import Estimate
from rto_fast.algo.credit import Credit, segment_ends
from rto_fast.contract import Rollout, Scores, Targets

NO_DELIMITERS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Coefficients:
    """Scales and bounds of a token's reward (Eq. 4.7); 0 = off."""

    beta1: float
    beta2: float
    beta3: float
    dpo_clip: float
    score_clip: float


def paid_by(tokens: Tensor, scales: Sequence[float], bound: float) -> Tensor:
    """[R] sum over sources of clip(scale * number, +-bound).

    tokens: [R, K] fp32, what the sources say; scales: K of them, of either sign; bound: 0 = none.
    """
    scaled = tokens * torch.tensor(scales, dtype=tokens.dtype, device=tokens.device)
    return (scaled.clamp(-bound, bound) if bound else scaled).sum(dim=1)


def targets_of(
    rollout: Rollout, scores: Scores, coefficients: Coefficients, *, credit: Credit,
    estimate: Callable[[Tensor, Scores, Tensor], Estimate], delimiters: Tensor = NO_DELIMITERS,
    scales: Sequence[float] = (), segment_entropy: float = 0.0,
) -> Targets:  # fmt: skip
    """Token rewards (Eq. 4.7), where they are paid, then advantages over the whole rollout.

    The rollout is the global one, so the whitening covers all ranks without another collective. estimate: an
    estimator with its settings filled in. delimiters: [K] int64, tokens that end a sentence. scales: of the columns of
    `scores.tokens`. segment_entropy: nats, above which a token begins a segment, where `scores` hold entropies. All of
    it runs where `scores` are.
    """
    cu = rollout.cu_responses.to(scores.values.device)
    reward = rto_kernels.token_rewards(
        scores.policy_logp, scores.ref_logp, scores.dpo_logp, scores.score,
        **dataclasses.asdict(coefficients), dpo_ref_logp=scores.dpo_ref_logp, cu_seqlens=cu,
    )  # fmt: skip
    ends = torch.isin(rollout.response_tokens, delimiters).to(cu.device)
    if scores.entropy.numel():
        ends = segment_ends(scores.entropy, segment_entropy)
    dense = reward.dpo_reward
    if scores.tokens.numel():
        dense = dense + paid_by(scores.tokens, scales, coefficients.dpo_clip)
    placed = credit(dense, cu, ends)
    rewards = reward.rewards + (placed - reward.dpo_reward)  # the same bits where nothing moves
    bound = coefficients.score_clip or math.inf
    score = coefficients.beta3 * scores.score.clamp(-bound, bound)
    estimated = estimate(rewards, dataclasses.replace(scores, score=score), cu)
    return Targets(
        rewards=rewards,
        dpo_reward=reward.dpo_reward,
        dense=dense,
        kl=reward.kl,
        advantages=estimated.advantages,
        returns=estimated.returns,
        whiten=estimated.whiten,
    )


@dataclass
class RunningScale:
    """Mean and deviation of every score so far (PPO-max, arXiv 2307.04964); scores are divided by the deviation.

    Nothing is subtracted, as in the authors' code: advantages take the mean away.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared differences from the mean."""

    def update(self, scores: Tensor) -> None:
        """scores: [B] of a rollout, all finite (Chan, Golub, LeVeque 1983, Eq. 2.1, in fp64)."""
        scores = scores.double()
        number, mean = scores.numel(), float(scores.mean())
        total, gap = self.count + number, mean - self.mean
        self.squares += float((scores - mean).square().sum()) + gap**2 * self.count * number / total
        self.mean += gap * number / total
        self.count = total

    @property
    def deviation(self) -> float:
        """Of the sample; 1 before there are two scores that differ."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 and self.squares else 1.0


@dataclass
class KLController:
    """beta2, fixed (target 0) or steered towards a mean KL of a token (Ziegler et al. 2019, section 2.2)."""

    beta2: float
    target: float
    horizon: int

    def update(self, kl: float, responses: int) -> None:
        """kl: mean log(pi / pi_ref) of a token (nats) over a rollout of `responses`."""
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            # A rollout beyond the horizon counts as one of it: five times as large, it would turn beta2's sign.
            self.beta2 *= 1 + error * min(responses / self.horizon, 1)
