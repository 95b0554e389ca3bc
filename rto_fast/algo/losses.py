"""The losses of policy and critic, one function each, on the kernels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import rto_kernels
import torch
from rto_kernels import LinearPPOLoss, PPOLoss
from torch import Tensor


class PolicyTerms(NamedTuple):
    """What a micro-batch's clipped policy loss takes beside the policy itself; token tensors [R] fp32."""

    old_logp: Tensor
    advantages: Tensor
    whiten: tuple[Tensor, Tensor]
    cu_seqlens: Tensor
    denominator: Tensor


def policy_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, terms: PolicyTerms, temperature: float, clip: float,
    entropy_coef: float, aggregation: str, **head: Any,
) -> LinearPPOLoss:  # fmt: skip
    """A micro-batch's share of the clipped policy loss (PPO's Eq. 7) and entropy bonus, read from the lm_head.

    hidden [R, H], weight [V, H], targets [R] int64; head: what a `heads.Read` is given besides. The gradients come
    with the loss: no logits are computed twice.
    """
    return rto_kernels.fused_linear_ppo_loss(
        hidden, weight, targets, **terms._asdict(), **head, temperature=temperature, clip=clip,
        entropy_coef=entropy_coef, return_entropy=True, aggregation=aggregation,
    )  # fmt: skip


def sampled_policy_loss(
    logp: Tensor, entropy: Tensor, sampler_logp: Tensor, *, terms: PolicyTerms, clip: float, entropy_coef: float,
    aggregation: str, is_cap: float,
) -> PPOLoss:  # fmt: skip
    """The same from log-probs, each token weighted by min(exp(old_logp - sampler_logp), is_cap); token tensors [R]."""
    if not entropy_coef:  # logged alone: its backward pass is spared
        entropy = entropy.detach()
    return rto_kernels.ppo_loss(
        logp, **terms._asdict(), clip=clip, entropy=entropy, entropy_coef=entropy_coef,
        aggregation=aggregation, sampler_logp=sampler_logp, is_cap=is_cap,
    )  # fmt: skip


class PairStats(NamedTuple):
    """Statistics of a pair loss, summed over the micro-batch and divided by the batch's pairs; `ratio_max` is a max."""

    ratio_mean: Tensor
    """Of exp(log-ratio of the first less that of the second)."""
    ratio_max: Tensor
    clip_fraction: Tensor
    """Share of pairs (separate clip: of responses) whose gradient the clip has cut off."""
    reward_gap: Tensor
    """Absolute difference of the two rewards."""


class OnlineStats(NamedTuple):
    """Statistics of an online token reward's update, with d = sum_t log(pi_dpo / pi_ref)(y_t) of a response.

    Summed over the micro-batch and divided by the batch's rows; `ratio_max` is a max.
    """

    accuracy: Tensor
    """Share of rows whose d has the sign that the outcome or the pair asks for; one without a sign counts a half."""
    ratio_max: Tensor
    """The largest |d|, nats."""


def p3o_loss(log_ratios: Tensor, reward_gap: Tensor, denominator: Tensor, clip: float) -> tuple[Tensor, PairStats]:
    """Pairwise PPO with the pair's *joint* ratio clipped (arXiv 2310.00212): one clip a pair, not one a token.

        d    = log rho(y1) - log rho(y2),   rho = pi / pi_old,   w = (r1 - r2) / 2
        loss = -sg(rho(y1) rho(y2)) * min(w * d, w * clip(d, log(1 - clip), log(1 + clip)))

    Since E_pi[grad log pi] = 0, the gradient of E_pi[r] over independent y1, y2 of pi is
    E_pi[w * (grad log pi(y1) - grad log pi(y2))]. With y1, y2 of pi_old each pair counts pi(y1) pi(y2) /
    (pi_old(y1) pi_old(y2)) = rho(y1) rho(y2) times, and grad d is what stands in the brackets. The clip stops a pair
    whose d has moved beyond it in the reward's direction. log_ratios [P, 2]: log rho; reward_gap [P]: r1 - r2.
    """
    change = log_ratios[:, 0] - log_ratios[:, 1]
    importance = log_ratios.detach().sum(1).exp()
    weight = reward_gap / 2
    lowest = math.log1p(-clip) if clip < 1 else -math.inf
    plain, clipped = weight * change, weight * change.clamp(lowest, math.log1p(clip))
    loss = -(importance * torch.minimum(plain, clipped)).sum() / denominator
    return loss, _pair_stats(change.exp(), clipped < plain, reward_gap, denominator)


def p3o_separate_loss(
    log_ratios: Tensor, reward_gap: Tensor, denominator: Tensor, clip: float
) -> tuple[Tensor, PairStats]:
    """Pairwise PPO with each response's ratio clipped on its own (the separate form of arXiv 2310.00212).

        A1 = (r1 - r2) / 2,   A2 = -A1,   loss = -sum_i min(A_i * rho_i, A_i * clip(rho_i, 1 - clip, 1 + clip))

    Over independent y1, y2 of pi_old, E[A1 rho(y1) + A2 rho(y2)] = E_pi[r] - E_pi_old[r]: without the clip the gradient
    is that of the expected reward. Where the joint form stops a pair, this one stops a response. log_ratios [P, 2];
    reward_gap [P].
    """
    ratios = log_ratios.exp()
    advantages = torch.stack([reward_gap, -reward_gap], 1) / 2
    plain, clipped = advantages * ratios, advantages * ratios.clamp(1 - clip, 1 + clip)
    loss = -torch.minimum(plain, clipped).sum() / denominator
    change = (log_ratios[:, 0] - log_ratios[:, 1]).exp()
    return loss, _pair_stats(change, (clipped < plain).float().mean(1), reward_gap, denominator)


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
    *,
    value_clip: float,
    aggregation: str,
) -> PPOLoss:
    """A micro-batch's share of the clipped value loss; all token tensors [R]."""
    idle = torch.zeros_like(returns)
    return rto_kernels.ppo_loss(
        idle, idle, idle, values, old_values, returns, value_clip=value_clip,
        aggregation=aggregation, denominator=denominator, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def loss_denominator(response_lens: Tensor, aggregation: str) -> Tensor:
    """The train batch's global count that its losses are divided by: non-empty responses, or response tokens."""
    count = (response_lens > 0).sum() if aggregation == "sequence" else response_lens.sum()
    return count.clamp(min=1).to(torch.float32)
