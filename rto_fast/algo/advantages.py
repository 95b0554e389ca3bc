"""From token rewards to advantages, one estimator a function.

rewards  [R] fp32 token rewards of the global rollout, whose responses to a prompt stand side by side
scores   its Scores (values are zeros in a run without a critic), the score as it is paid: scaled and clipped
cu       [B + 1] int64 boundaries of the responses
gamma    discount a token
lam      GAE's lambda
group    responses a prompt
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import rto_kernels
import torch
from torch import Tensor

from rto_fast.contract import Scores

GROUP_STD_FLOOR = 1e-4
"""Added to a group's deviation, reward units; as in TRL's GRPO."""


@dataclass(frozen=True)
class Estimate:
    """fp32, no gradient."""

    advantages: Tensor
    """[R], before `whiten`."""
    returns: Tensor
    """[R] what a critic learns; without one the reward still to come."""
    whiten: tuple[Tensor, Tensor]
    """(mean, rstd), fp64 scalars."""


def gae(rewards: Tensor, scores: Scores, cu: Tensor, *, gamma: float, lam: float, group: int) -> Estimate:
    """Generalised advantage estimation with a critic (arXiv 1506.02438), whitened over the whole rollout."""
    out = rto_kernels.gae(rewards, scores.values, gamma=gamma, lam=lam, cu_seqlens=cu, bootstrap=scores.bootstrap)
    return Estimate(out.advantages, out.returns, rto_kernels.whiten_moments(out.moments))


def reinforce_pp(rewards: Tensor, scores: Scores, cu: Tensor, *, gamma: float, lam: float, group: int) -> Estimate:
    """REINFORCE++ (arXiv 2501.03262): returns-to-go without a critic, whitened over the whole rollout."""
    out = rto_kernels.gae(rewards, torch.zeros_like(rewards), gamma=gamma, lam=1.0, cu_seqlens=cu)
    return Estimate(out.advantages, out.advantages, rto_kernels.whiten_moments(out.moments))


def returns(rewards: Tensor, scores: Scores, cu: Tensor, *, gamma: float, lam: float, group: int) -> Estimate:
    """The reward still to come itself, not whitened: the gradient is that of the expected return (gamma 1)."""
    to_go, _ = _returns(rewards, cu, gamma, group)
    return Estimate(to_go, to_go, _identity(rewards))


def rloo(rewards: Tensor, scores: Scores, cu: Tensor, *, gamma: float, lam: float, group: int) -> Estimate:
    """Leave-one-out (arXiv 2402.14740): return-to-go less the mean return of the prompt's other responses.

    Where only the last token is rewarded (and gamma is 1) this is the paper's; token rewards keep their credit.
    """
    to_go, totals = _returns(rewards, cu, gamma, group)
    baseline = (totals.sum(1, keepdim=True) - totals) / (totals.shape[1] - 1)
    return Estimate(to_go - _per_token(baseline, cu), to_go, _identity(rewards))


def q(rewards: Tensor, scores: Scores, cu: Tensor, *, gamma: float, lam: float, group: int) -> Estimate:
    """Token rewards as advantages, and the score less the mean score of the prompt's other responses.

    beta * log(pi_dpo / pi_ref) is r + V*(s') - V*(s), an advantage already (arXiv 2404.12358; RTO's Eq. 3.3), so that
    a token answers for its own reward alone; the score, which no token has earned alone, is RLOO's. Nothing is
    discounted. An empty response is paid nothing and counts 0.
    """
    some = cu.diff() > 0
    final = torch.where(some, scores.score, 0)
    own = rewards.clone()
    own[cu[1:][some] - 1] -= final[some]
    totals = final.view(-1, group)
    centred = totals - (totals.sum(1, keepdim=True) - totals) / (group - 1)
    to_go, _ = _returns(rewards, cu, gamma, group)
    return Estimate(own + _per_token(centred, cu), to_go, _identity(rewards))


def grpo(rewards: Tensor, scores: Scores, cu: Tensor, *, gamma: float, lam: float, group: int) -> Estimate:
    """Group-relative (arXiv 2402.03300, Sec. 4.1): return-to-go less the prompt's mean return, by its deviation.

    Where only the last token is rewarded (and gamma is 1) this is the paper's; token rewards keep their credit.
    """
    to_go, totals = _returns(rewards, cu, gamma, group)
    mean, std = totals.mean(1, keepdim=True), totals.std(1, keepdim=True)
    scale = (std + GROUP_STD_FLOOR).reciprocal()
    advantages = (to_go - _per_token(mean.expand_as(totals), cu)) * _per_token(scale.expand_as(totals), cu)
    return Estimate(advantages, to_go, _identity(rewards))


def pair(rewards: Tensor, scores: Scores, cu: Tensor, *, gamma: float, lam: float, group: int) -> Estimate:
    """What P3O and REBEL see of two responses to a prompt: each total less the pair's mean, at every token."""
    totals = torch.segment_reduce(rewards, "sum", lengths=cu.diff()).view(-1, 2)
    centred = _per_token(totals - totals.mean(1, keepdim=True), cu)
    return Estimate(centred, _returns(rewards, cu, gamma, group)[0], _identity(rewards))


ESTIMATORS: dict[str, Callable[..., Estimate]] = {
    "gae": gae,
    "reinforce_pp": reinforce_pp,
    "rloo": rloo,
    "grpo": grpo,
    "returns": returns,
    "q": q,
}


def _returns(rewards: Tensor, cu: Tensor, gamma: float, group: int) -> tuple[Tensor, Tensor]:
    """([R] return-to-go, [prompts, responses a prompt] return of each response, 0 of an empty one)."""
    to_go = rto_kernels.gae(rewards, torch.zeros_like(rewards), gamma=gamma, lam=1.0, cu_seqlens=cu).advantages
    some = cu.diff() > 0
    totals = rewards.new_zeros(some.numel())
    totals[some] = to_go[cu[:-1][some]]
    return to_go, totals.view(-1, group)


def _per_token(values: Tensor, cu: Tensor) -> Tensor:
    """[prompts, responses a prompt] -> [R]."""
    return torch.repeat_interleave(values.reshape(-1), cu.diff())


def _identity(like: Tensor) -> tuple[Tensor, Tensor]:
    zero = torch.zeros((), dtype=torch.float64, device=like.device)
    return zero, zero + 1
