"""The demo's settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from rto_fast.config import expand_home
from rto_fast.errors import ConfigError

ARMS = ("PPO", "RTO")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The embedded task, trained from nothing to RTO against PPO."""

    output_dir: str = "runs/demo"
    """Folder of the whole demo; run again, it goes on where it stopped."""
    seed: int = 0
    """Seed of the task, the data, the initial weights and the sampling."""
    difficulty: Literal["easy", "medium", "hard"] = "medium"
    """How sparse and how delayed the true token reward is."""

    # Data
    corpus_rows: int = 4000
    """Texts of the SFT corpus."""
    pairs: int = 1000
    """Preference pairs, sampled from the SFT model."""
    prompts: int = 2000
    """Prompts that RTO and PPO draw from."""
    eval_prompts: int = 512
    """Prompts that all models are judged on, in none of the training data by construction of their seed."""
    max_response_length: int = 48
    """Tokens sampled at most."""

    heads: int = 4
    """Attention heads of the models, 64 wide in all; vLLM on a CPU needs 2."""

    # Stages
    sft_lr: float = 2e-3
    """Peak learning rate of SFT."""
    rm_lr: float = 5e-4
    """Peak learning rate of the reward model."""
    rm_batch: int = 16
    """Pairs a reward-model step."""
    rm_epochs: float = 3.0
    """Passes of the reward model over its pairs."""
    dpo_lr: float = 5e-4
    """Peak learning rate of DPO."""
    stage_epochs: float = 2.0
    """Passes of SFT and DPO over their rows."""
    dpo_beta: float = 0.1
    """DPO's beta."""

    # RTO and PPO
    iterations: int = 40
    """Rollouts of each arm."""
    rollout_batch: int = 64
    """Responses a rollout."""
    train_batch: int = 16
    """Responses an update."""
    policy_lr: float = 5e-4
    """Peak learning rate of the policy, both arms."""
    critic_lr: float = 1e-3
    """Peak learning rate of the critic, both arms."""
    beta1: float = 0.1
    """RTO's scale of the token reward; PPO's is 0. With beta2 the paper's values for TL;DR."""
    dpo_clip: float = 0.1
    """Bound on the scaled token reward; 0 = off."""
    beta2: float = 0.05
    """Scale of the KL penalty, both arms."""

    def __post_init__(self) -> None:
        expand_home(self)

    def validate(self) -> None:
        """Raises ConfigError on sizes that are not positive; the stages check the rest."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("seed", "dpo_clip", "beta2") and isinstance(value, int | float) and not value > 0:
                raise ConfigError(f"{field.name}: must be positive, got {value}")
