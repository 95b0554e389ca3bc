"""The paper's formulas, one function each, on the kernels; nothing else in the trainer does arithmetic on rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import rto_kernels
import torch
from rto_kernels import LinearPPOLoss, PPOLoss
from torch import Tensor

from rto_fast.advantages import ESTIMATORS, pair
from rto_fast.config import RTOConfig
from rto_fast.contract import Rollout, Scores, Targets
from rto_fast.credit import CREDIT

NO_DELIMITERS = torch.empty(0, dtype=torch.int64)


def targets(
    rollout: Rollout, scores: Scores, config: RTOConfig, beta2: float, delimiters: Tensor = NO_DELIMITERS
) -> Targets:
    """Token rewards (Eq. 4.7), where they are paid, then advantages (by default GAE) over the whole rollout.

    The rollout is the global one, so the whitening covers all ranks without another collective. beta2 is passed
    beside the config because the adaptive controller moves it. delimiters: [K] int64, tokens that end a sentence.
    All of it runs where `scores` are.
    """
    cu = rollout.cu_responses.to(scores.values.device)
    reward = rto_kernels.token_rewards(
        scores.policy_logp, scores.ref_logp, scores.dpo_logp, scores.score,
        beta1=config.beta1, beta2=beta2, beta3=config.beta3, dpo_clip=config.dpo_clip,
        score_clip=config.score_clip, dpo_ref_logp=scores.dpo_ref_logp, cu_seqlens=cu,
    )  # fmt: skip
    ends_sentence = torch.isin(rollout.response_tokens, delimiters).to(cu.device)
    dense = CREDIT[config.credit](reward.dpo_reward, cu, ends_sentence)
    rewards = reward.rewards + (dense - reward.dpo_reward)  # the same bits where nothing moves
    estimator = ESTIMATORS[config.advantage] if config.policy_update == "ppo" else pair
    estimate = estimator(rewards, scores, cu, config)
    return Targets(
        rewards=rewards,
        dpo_reward=reward.dpo_reward,
        kl=reward.kl,
        advantages=estimate.advantages,
        returns=estimate.returns,
        whiten=estimate.whiten,
    )


class PolicyTerms(NamedTuple):
    """What a micro-batch's clipped policy loss takes beside the policy itself; token tensors [R] fp32."""

    old_logp: Tensor
    advantages: Tensor
    whiten: tuple[Tensor, Tensor]
    cu_seqlens: Tensor
    denominator: Tensor


def policy_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, terms: PolicyTerms, config: RTOConfig, **head: Any
) -> LinearPPOLoss:
    """A micro-batch's share of the clipped policy loss (PPO's Eq. 7) and entropy bonus, read from the lm_head.

    hidden [R, H], weight [V, H], targets [R] int64; head: what a `models.Read` is given besides. The gradients come
    with the loss: no logits are computed twice.
    """
    return rto_kernels.fused_linear_ppo_loss(
        hidden, weight, targets, **terms._asdict(), **head, temperature=config.temperature, clip=config.clip,
        entropy_coef=config.entropy_coef, return_entropy=True, aggregation=config.loss_aggregation,
    )  # fmt: skip


def sampled_policy_loss(
    logp: Tensor, entropy: Tensor, sampler_logp: Tensor, *, terms: PolicyTerms, config: RTOConfig
) -> PPOLoss:
    """The same from log-probs, each token weighted by min(exp(old_logp - sampler_logp), is_cap); token tensors [R]."""
    if not config.entropy_coef:  # logged alone: its backward pass is spared
        entropy = entropy.detach()
    return rto_kernels.ppo_loss(
        logp, **terms._asdict(), clip=config.clip, entropy=entropy, entropy_coef=config.entropy_coef,
        aggregation=config.loss_aggregation, sampler_logp=sampler_logp, is_cap=config.is_cap,
    )  # fmt: skip


class PairStats(NamedTuple):
    """Statistics of a pair loss, summed over the micro-batch and divided by the batch's pairs; `ratio_max` is a max."""

    ratio_mean: Tensor
    """Of exp(log-ratio of the first less that of the second)."""
    ratio_max: Tensor
    clip_fraction: Tensor
    """Share of pairs whose gradient the clip has cut off."""
    reward_gap: Tensor
    """Absolute difference of the two rewards."""


def p3o_loss(log_ratios: Tensor, reward_gap: Tensor, denominator: Tensor, clip: float) -> tuple[Tensor, PairStats]:
    """Pairwise PPO with the pair's *joint* ratio clipped (arXiv 2310.00212): one ratio a pair, not one a token.

        ratio = exp(log(pi / pi_old)(y1) - log(pi / pi_old)(y2)),   w = (r1 - r2) / 2
        loss  = -min(w * ratio, w * clip(ratio, 1 - clip, 1 + clip))

    At pi = pi_old its gradient is P3O's, -w * grad(log pi(y1) - log pi(y2)). log_ratios [P, 2]; reward_gap [P].
    """
    ratio = (log_ratios[:, 0] - log_ratios[:, 1]).exp()
    weight = reward_gap / 2
    plain, clipped = weight * ratio, weight * ratio.clamp(1 - clip, 1 + clip)
    loss = -torch.minimum(plain, clipped).sum() / denominator
    return loss, _pair_stats(ratio, clipped < plain, reward_gap, denominator)


def rebel_loss(log_ratios: Tensor, reward_gap: Tensor, denominator: Tensor, eta: float) -> tuple[Tensor, PairStats]:
    """Regression to relative rewards (arXiv 2404.16767, Eq. 9): (log-ratio difference / eta - (r1 - r2))^2.

    log_ratios [P, 2]; reward_gap [P].
    """
    difference = log_ratios[:, 0] - log_ratios[:, 1]
    loss = (difference / eta - reward_gap).square().sum() / denominator
    return loss, _pair_stats(difference.exp(), torch.zeros_like(difference), reward_gap, denominator)


def _pair_stats(ratio: Tensor, cut: Tensor, reward_gap: Tensor, denominator: Tensor) -> PairStats:
    ratio = ratio.detach()
    means = [x.float().sum() / denominator for x in (ratio, cut, reward_gap.abs())]
    return PairStats(means[0], ratio.max(), means[1], means[2])


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    cu_seqlens: Tensor,
    denominator: Tensor,
    config: RTOConfig,
) -> PPOLoss:
    """A micro-batch's share of the clipped value loss; all token tensors [R]."""
    idle = torch.zeros_like(returns)
    return rto_kernels.ppo_loss(
        idle, idle, idle, values, old_values, returns, value_clip=config.value_clip,
        aggregation=config.loss_aggregation, denominator=denominator, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def loss_denominator(response_lens: Tensor, aggregation: str) -> Tensor:
    """The train batch's global count that its losses are divided by: non-empty responses, or response tokens."""
    count = (response_lens > 0).sum() if aggregation == "sequence" else response_lens.sum()
    return count.clamp(min=1).to(torch.float32)


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
            self.beta2 *= 1 + error * responses / self.horizon
