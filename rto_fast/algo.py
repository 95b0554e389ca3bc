"""The paper's formulas, one function each, on the kernels; nothing else in the trainer does arithmetic on rewards."""

from __future__ import annotations

from dataclasses import dataclass

import rto_kernels
import torch
from rto_kernels import PPOLoss
from torch import Tensor

from rto_fast.batch import Rollout, Scores, Targets
from rto_fast.config import RTOConfig


def targets(rollout: Rollout, scores: Scores, config: RTOConfig, beta2: float) -> Targets:
    """Token rewards (Eq. 4.7), then GAE and its whitening over the whole rollout.

    The rollout is the global one, so the whitening covers all ranks without another collective. beta2 is passed
    beside the config because the adaptive controller moves it. All of it runs where `scores` are.
    """
    cu = rollout.cu_responses.to(scores.values.device)
    reward = rto_kernels.token_rewards(
        scores.policy_logp, scores.ref_logp, scores.dpo_logp, scores.score,
        beta1=config.beta1, beta2=beta2, beta3=config.beta3, dpo_clip=config.dpo_clip,
        score_clip=config.score_clip, dpo_ref_logp=scores.dpo_ref_logp, cu_seqlens=cu,
    )  # fmt: skip
    estimate = rto_kernels.gae(
        reward.rewards, scores.values, gamma=config.gamma, lam=config.lam, cu_seqlens=cu, bootstrap=scores.bootstrap
    )
    return Targets(
        rewards=reward.rewards,
        dpo_reward=reward.dpo_reward,
        kl=reward.kl,
        advantages=estimate.advantages,
        returns=estimate.returns,
        whiten=rto_kernels.whiten_moments(estimate.moments),
    )


def policy_loss(
    logp: Tensor,
    entropy: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    whiten: tuple[Tensor, Tensor],
    cu_seqlens: Tensor,
    denominator: Tensor,
    config: RTOConfig,
) -> PPOLoss:
    """A micro-batch's share of the clipped policy loss (PPO's Eq. 7) and entropy bonus; all token tensors [R]."""
    if not config.entropy_coef:  # logged alone: its backward pass is spared
        entropy = entropy.detach()
    return rto_kernels.ppo_loss(
        logp, old_logp, advantages, clip=config.clip, whiten=whiten, entropy=entropy,
        entropy_coef=config.entropy_coef, aggregation=config.loss_aggregation, denominator=denominator,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


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
