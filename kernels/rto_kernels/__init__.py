"""Fused, exact Triton kernels for Reinforced Token Optimization and PPO; torch and triton are all they need."""

import importlib

from .gae import GAE, gae, rewards_gae, whiten_moments
from .ppo_loss import PPOLoss, PPOStats, gae_ppo_loss, ppo_loss
from .token_rewards import TokenRewards, token_rewards

_LAZY = {
    "token_kl": "linear_kl",
    "token_logprobs": "linear_logprob",
    "logprobs_from_logits": "logprob",
    "logits_token_rewards": "fused_rewards",
    "fused_token_rewards": "fused_rewards",
    "fused_linear_ppo_loss": "linear_ppo",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(name)


__all__ = [
    "GAE",
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
    "whiten_moments",
]
