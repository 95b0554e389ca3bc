"""Fused, exact Triton kernels for Reinforced Token Optimization and PPO; they need torch and triton alone."""

from .fused_rewards import fused_token_rewards, logits_token_rewards
from .gae import GAE, gae, rewards_gae, whiten_moments
from .gae_ppo_loss import gae_ppo_loss
from .linear_kl import token_kl
from .linear_logprob import token_logprobs
from .linear_ppo import LinearPPOLoss, fused_linear_ppo_loss
from .logits_logprob import logprobs_from_logits
from .ppo_loss import PPOLoss, PPOStats, ppo_loss
from .token_rewards import TokenRewards, token_rewards
from .warm import warm

__all__ = [
    "GAE",
    "LinearPPOLoss",
    "PPOLoss",
    "PPOStats",
    "TokenRewards",
    "fused_linear_ppo_loss",
    "fused_token_rewards",
    "gae",
    "gae_ppo_loss",
    "logits_token_rewards",
    "logprobs_from_logits",
    "ppo_loss",
    "rewards_gae",
    "token_kl",
    "token_logprobs",
    "token_rewards",
    "warm",
    "whiten_moments",
]

__version__ = "0.1.0"
