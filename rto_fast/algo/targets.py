"""From scores to token rewards, advantages and returns; the controller of the KL penalty.

Nothing else in the trainer does arithmetic on rewards.
"""

from __future__ import annotations

from dataclasses import dataclass

import rto_kernels
import torch
from torch import Tensor

from rto_fast.algo.advantages import ESTIMATORS, pair
from rto_fast.algo.credit import CREDIT
from rto_fast.config import RTOConfig
from rto_fast.contract import Rollout, Scores, Targets

NO_DELIMITERS = torch.empty(0, dtype=torch.int64)


def compute_targets(
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
