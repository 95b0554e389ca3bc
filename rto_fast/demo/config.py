"""The settings of the embedded tasks."""

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
    """Prompts that all models are judged on, drawn with a seed of their own; there are so few openings that most of
    them stand in the training data too."""
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
        _check_positive(self, but=("seed", "dpo_clip", "beta2"))


@dataclass(frozen=True, kw_only=True)
class ArithmeticConfig:
    """Embedded sums: a model that is often wrong, trained by whether it is right."""

    output_dir: str = "runs/arithmetic"
    """Folder of data, models and logs; run again, it goes on where it stopped."""
    seed: int = 0
    """Seed of the problems, the initial weights and the sampling."""
    held_out: int = 60
    """Of the 180 problems, those that are judged on alone."""
    corpus_rows: int = 9600
    """Answers that SFT learns from."""
    wrong_share: float = 0.5
    """Share of them that is wrong."""
    sft_lr: float = 4e-3
    """Peak learning rate of SFT."""
    sft_epochs: float = 2.0
    """Passes of SFT over its rows."""
    advantage: Literal["reinforce_pp", "grpo", "rloo"] = "rloo"
    """Estimator, without a critic."""
    iterations: int = 30
    """Rollouts."""
    rollout_batch: int = 32
    """Problems a rollout."""
    responses_per_prompt: int = 4
    """Responses to each."""
    train_batch: int = 64
    """Responses an update."""
    policy_lr: float = 5e-4
    """Peak learning rate of the policy."""

    def __post_init__(self) -> None:
        expand_home(self)

    def validate(self) -> None:
        """Raises ConfigError on sizes that are not positive, and on shares beyond 1; the stages check the rest."""
        _check_positive(self, but=("seed", "wrong_share"))
        if not 0 <= self.wrong_share <= 1:
            raise ConfigError(f"wrong_share: must lie in [0, 1], got {self.wrong_share}")
        if self.held_out >= 180:
            raise ConfigError(f"held_out: {self.held_out} of the 180 problems leave none to train on")


def _check_positive(config: DemoConfig | ArithmeticConfig, but: tuple[str, ...]) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in but and isinstance(value, int | float) and not value > 0:
            raise ConfigError(f"{field.name}: must be positive, got {value}")
