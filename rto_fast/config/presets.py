"""RTO with other defaults: PPO, distillation and verifiable rewards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Suppress

from rto_fast.config.base import follows
from rto_fast.config.rto import RTOConfig
from rto_fast.errors import require

OF_TOKEN_REWARDS = ("dpo_model", "dpo_weight", "dpo_pessimism", "dpo_ref", "dpo_clip", "token_reward_weight", "credit")
"""Settings that token rewards alone read."""


def refuse_unread(config: RTOConfig, names: tuple[str, ...], why: str) -> None:
    """Raises ConfigError on the first of these settings that is not RTO's default."""
    plain = RTOConfig()
    for name in names:
        value = getattr(config, name)
        require(value == getattr(plain, name), f"{name}: {value!r} is not read {why}")


@dataclass(frozen=True, kw_only=True)
class PPOConfig(RTOConfig):
    """PPO: RTO's loop without the token reward."""

    beta1: float = 0.0
    """Scale of the token rewards; 0 = none, above 0 this is RTO and needs their source, such as --dpo-model."""

    def validate(self) -> None:
        if not self.pays_tokens:
            refuse_unread(self, OF_TOKEN_REWARDS, "by ppo; pass --beta1 above 0, or leave it out")
        super().validate()


UNREAD_BY_DISTILL = {
    "dpo_model": "the teacher is --teacher", "dpo_weight": "the teacher's weight is --scale",
    "dpo_pessimism": "there is one teacher", "dpo_ref": "the teacher's log-ratio is taken against --base",
    "token_reward_weight": "the teacher's weight is --scale", "token_reward_alpha": "the teacher is --teacher",
    "online": "the teacher stays as it is; rto-fast rto has --online",
}  # fmt: skip
"""Setting -> what to pass instead."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RTOConfig):
    """On-policy distillation (arXiv 2602.12125): RTO whose token reward is a teacher's log-ratio, and nothing else.

    Maximises E[scale * log(pi_teacher / pi_base)] - KL(pi || pi_base) over the policy's own responses. With scale 1
    that is -KL(pi || pi_teacher), whatever the base.
    """

    teacher: str = ""
    """Language model on the policy's tokens (folder or Hub id)."""
    base: str = ""
    """The model that the teacher's log-ratio and the KL are taken against; empty = the policy's start."""
    scale: float = 1.0
    """Weight of the teacher's log-ratio; above 1 the policy goes beyond the teacher, away from the base."""
    reference: Annotated[str, Suppress] = follows("", "the KL's base is that of the teacher's log-ratio, pass --base")
    """The base."""
    token_reward: Annotated[tuple[str, ...], Suppress] = follows(
        (), "the token reward is the teacher's log-ratio, pass --teacher"
    )
    """The teacher's log-ratio."""
    beta1: Annotated[float, Suppress] = follows(0.0, "it is scale times beta2, pass --scale and --beta2")
    """scale times beta2."""
    beta2: float = 1.0
    """Scale of the KL against the base, and so of the whole objective; beta1 is scale times it."""
    beta3: float = 0.0
    """Scale of the response's score at its last token; 0 = no reward model."""
    dpo_clip: float = 0.0
    """Bound on |beta1 * log(pi_teacher / pi_base)| of a token (reward units); 0 = off."""
    advantage: Literal["gae", "reinforce_pp", "grpo", "rloo", "returns", "q"] = "returns"
    """Estimator; returns takes the reward still to come as it is, without a critic and without whitening."""
    gamma: float = 0.0
    """Discount a token. 0: a token answers for its own log-ratio; 1: for all that follow, the whole KL's gradient."""
    loss_aggregation: Literal["sequence", "token"] = "token"
    """Mean over all tokens, or over a response's tokens, then responses."""

    def __post_init__(self) -> None:
        """teacher, base and scale are spoken of as the settings that they stand for."""
        super().__post_init__()
        for name in ("teacher", "base"):
            object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        if self.teacher:
            object.__setattr__(self, "token_reward", (f"logratio:{self.teacher}",))
        object.__setattr__(self, "reference", self.base)
        object.__setattr__(self, "beta1", self.scale * self.beta2)

    def validate(self) -> None:
        require(bool(self.teacher), "teacher: no model given; pass --teacher (folder or Hub id)")
        require(":" not in self.teacher, f"teacher: {self.teacher!r} must not have a colon")
        require(self.scale > 0, f"scale: must be positive, got {self.scale}")
        require(self.beta2 > 0, f"beta2: scales the whole objective, must be positive, got {self.beta2}")
        plain = RTOConfig()
        for name, instead in UNREAD_BY_DISTILL.items():
            require(getattr(self, name) == getattr(plain, name), f"{name}: distillation does not read it; {instead}")
        super().validate()


@dataclass(frozen=True, kw_only=True)
class RLVRConfig(RTOConfig):
    """Reinforcement learning with verifiable rewards: a function scores each response by the data's own answer.

    Policy gradients without a critic and without a token reward by default; RTO where a DPO model is named.
    """

    reward_fn: tuple[str, ...] = ("rto_fast.scoring.math_answers:correct",)
    """Python reward functions, module:function; they get what their signatures name, columns of the data among it."""
    prompt_key: str = "question"
    """Column of the prompt; auto: `context_messages`, `prompt` or `instruction`, whichever is there first."""
    beta1: float = RTOConfig.beta1
    """Scale of the token rewards that --dpo-model or --token-reward names; without one none is paid. 0 = off."""
    beta2: float = 0.001
    """Scale of the KL penalty log(pi / pi_ref); 0 = off."""
    advantage: Literal["gae", "reinforce_pp", "grpo", "rloo", "returns", "q"] = "rloo"
    """Estimator; only gae has a critic, grpo and rloo compare responses_per_prompt >= 2 responses, returns takes the
    reward still to come as it is."""
    rollout_batch: int = 128
    """Prompts a rollout, over all ranks."""
    responses_per_prompt: int = 8
    """Responses sampled from each prompt."""
    train_batch: int = 256
    """Responses a policy update, over all ranks."""
    policy_lr: float = 1e-6
    """Peak learning rate of the policy's weights."""
    lora_policy_lr: float = 1e-5
    """Peak learning rate of the policy's adapter, in place of policy_lr."""

    @property
    def names_tokens(self) -> bool:
        """Whether a source of token rewards is named; `dpo`, the default, is where its model is."""
        return bool(self.dpo_model) or self.token_reward != RTOConfig().token_reward

    @property
    def pays_tokens(self) -> bool:
        return bool(self.beta1) and self.names_tokens

    def validate(self) -> None:
        require(
            bool(self.data),
            f"data: no problems given; pass --data (rows with the columns {self.prompt_key!r} and 'answer'), or try "
            "rto-fast arithmetic, which makes its own",
        )
        if self.beta1 and not self.names_tokens:
            remedy = "pass --dpo-model or --token-reward, or leave it out"
            same = self.beta1 == RTOConfig().beta1
            require(same, f"beta1: {self.beta1} scales token rewards, and none is named; {remedy}")
            refuse_unread(self, OF_TOKEN_REWARDS, f"where no token reward is named; {remedy}")
        super().validate()
