"""Which settings of the loop go together."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rto_fast.config.rto_settings import RTOSettings
from rto_fast.errors import require
from rto_fast.redact import ENCODED, redacted, without_credentials

SOCKET_BYTES = 107
"""Of the path of a Unix socket at most."""


@dataclass(frozen=True, kw_only=True)
class RTOConfig(RTOSettings):
    """Reinforced Token Optimization; beta1 = 0 is PPO."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one = (self.dpo_model,) if isinstance(self.dpo_model, str) else self.dpo_model
        object.__setattr__(self, "dpo_model", tuple(filter(None, one)))

    def validate(self) -> None:
        super().validate()
        require(bool(self.policy), "policy: no model given; pass --policy (folder or Hub id)")
        self._check_adapters()
        self._check_token_rewards()
        self._check_online()
        require(
            bool(self.reward_sources) or self.beta3 == 0,
            "reward_model: no reward source; pass --reward-model, --reward-fn or --reward-url, or --beta3 0",
        )
        require(
            len(self.reward_weights) == len(self.reward_sources),
            f"reward_weight: {len(self.reward_weights)} weights for {len(self.reward_sources)} reward sources",
        )
        require(
            self.critic != "reward" or bool(self.reward_model),
            "critic: 'reward' needs a reward model; pass --reward-model, or --critic policy",
        )
        for name in (
            "beta1", "beta2", "beta3", "dpo_clip", "dpo_pessimism", "score_clip", "kl_target", "entropy_coef",
            "value_clip", "is_cap", "iterations", "critic_warmup", "reward_retries", "report_samples", "export_every",
            "rollout_oversample", "min_response_length", "ptx_coef", "online_patience",
        ):  # fmt: skip
            require(getattr(self, name) >= 0, f"{name}: must not be negative, got {getattr(self, name)}")
        for name in (
            "rollout_batch", "responses_per_prompt", "train_batch", "ppo_epochs", "max_prompt_length",
            "max_response_length", "rollout_tokens", "score_tokens", "kl_horizon", "vllm_max_sequences",
            "vllm_tensor_parallel",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, f"{name}: must be at least 1, got {getattr(self, name)}")
        require(
            self.min_response_length < self.max_response_length,
            f"min_response_length: {self.min_response_length} leaves no room for an end within max_response_length "
            f"{self.max_response_length}",
        )
        require(
            self.kl_target == 0 or self.beta2 > 0,
            "kl_target: beta2 is multiplied towards it, and 0 stays 0; pass a --beta2 above 0, or --kl-target 0",
        )
        require(0 < self.vllm_memory_share < 1, f"vllm_memory_share: must lie in (0, 1), got {self.vllm_memory_share}")
        for name in (
            "epochs", "temperature", "policy_lr", "critic_lr", "reward_timeout_s", "rollout_timeout_s",
            "vllm_start_timeout_s", "online_lr", "online_beta", "lora_policy_lr", "lora_critic_lr", "lora_online_lr",
        ):  # fmt: skip
            require(getattr(self, name) > 0, f"{name}: must be positive, got {getattr(self, name)}")
        require(0 < self.clip < 1, f"clip: must lie in (0, 1), got {self.clip}")
        for name in ("gamma", "lam"):
            require(0 <= getattr(self, name) <= 1, f"{name}: must lie in [0, 1], got {getattr(self, name)}")
        require(0 <= self.ema_decay < 1, f"ema_decay: must lie in [0, 1), got {self.ema_decay}")
        self._check_variants()
        self._check_ptx()
        self._check_engine()
        require(
            self.responses % self.train_batch == 0,
            f"train_batch: {self.train_batch} does not divide the {self.responses} responses of a rollout "
            f"(rollout_batch {self.rollout_batch} x responses_per_prompt {self.responses_per_prompt})",
        )

    def _check_ptx(self) -> None:
        require(
            not self.ptx_coef or bool(self.ptx_data),
            f"ptx_data: ptx_coef {self.ptx_coef:g} needs supervised rows; pass --ptx-data, or --ptx-coef 0",
        )
        unread = {"ptx_data": "", "ptx_split": "", "ptx_prompt_key": "prompt", "ptx_response_key": "auto"}
        for name, off in unread.items():
            value = getattr(self, name)
            require(
                bool(self.ptx_coef) or value == off,
                f"{name}: {value!r} is not read with ptx_coef 0; pass a --ptx-coef above 0, or leave it out",
            )

    def _check_token_rewards(self) -> None:
        count, models = len(self.token_reward), len(self.dpo_model)
        weights = len(self.token_reward_weight)
        require(weights in (0, count), f"token_reward_weight: {weights} weights for {count} sources of --token-reward")
        for name in ("token_reward", "dpo_model"):
            given = getattr(self, name)
            require(len(set(given)) == len(given), f"{name}: one of {', '.join(redacted(given))} comes twice")
        default = RTOConfig.__dataclass_fields__["token_reward"].default
        require(
            self.pays_tokens or self.token_reward in ((), default),
            "token_reward: beta1 = 0 pays no token rewards; pass a --beta1 above 0",
        )
        require(
            not self.dpo_scale or bool(models),
            "dpo_model: beta1 > 0 needs a DPO model; pass --dpo-model, or --beta1 0 for PPO, or another --token-reward",
        )
        weights = len(self.dpo_weight)
        require(weights in (0, models), f"dpo_weight: {weights} weights for {models} DPO models")
        require(
            self.dpo_pessimism <= 0 or models > 1,
            f"dpo_pessimism: a deviation over DPO models needs at least 2 of them, got {models}",
        )
        require(self.token_reward_alpha > 0, f"token_reward_alpha: must be positive, got {self.token_reward_alpha}")
        self._check_token_rewards_read()

    def _check_token_rewards_read(self) -> None:
        """Without a DPO model as the source nothing reads its settings; without token rewards they are left."""
        kinds, fields = {spec.kind for spec, _ in self.token_sources}, type(self).__dataclass_fields__
        for name, read, reader in (
            ("dpo_weight", "dpo" in kinds or not self.pays_tokens, "--token-reward dpo"),
            ("dpo_pessimism", "dpo" in kinds or not self.pays_tokens, "--token-reward dpo"),
            ("dpo_ref", "dpo" in kinds or not self.pays_tokens, "--token-reward dpo"),
            ("token_reward_alpha", "endogenous" in kinds, "--token-reward endogenous"),
            ("segment_entropy", self.credit == "segment", "--credit segment"),
            ("delimiters", self.credit == "sentence", "--credit sentence"),
            ("rebel_eta", self.policy_update == "rebel", "--policy-update rebel"),
        ):
            value = getattr(self, name)
            require(read or value == fields[name].default, f"{name}: {value!r} is not read without {reader}")

    def _check_adapters(self) -> None:
        self.check_lora()
        require(
            not self.lora_dropout,
            f"lora_dropout: {self.lora_dropout} would make PPO's first ratio another number than 1; use 0",
        )
        require(
            not (self.lora_rank and self.ema_decay),
            "ema_decay: averages whole weights, which adapters leave as they are; use 0 with --lora-rank",
        )

    def _check_online(self) -> None:
        fields, pairs = type(self).__dataclass_fields__, self.online == "dpo"
        for name in ("online_lr", "online_beta", "online_order", "online_outcome", "online_patience"):
            value, readers = getattr(self, name), ("prime",) if name == "online_outcome" else ("prime", "dpo")
            require(
                self.online in readers or value == fields[name].default,
                f"{name}: {value!r} is not read with --online {self.online}; leave it out, or pass another --online",
            )
        if self.online == "off":
            return
        require(
            bool(self.dpo_scale),
            f"online: {self.online} trains the DPO model, and no token reward comes from it; pass --token-reward dpo "
            "and a --beta1 above 0, or --online off",
        )
        require(
            self.dpo_weights == (1.0,),
            f"online: {self.online} trains one DPO model of weight 1, got {len(self.dpo_model)} of weights "
            f"{', '.join(f'{w:g}' for w in self.dpo_weights)}",
        )
        require(
            bool(self.reward_sources),
            f"online: {self.online} learns from scores; pass --reward-model, --reward-fn or --reward-url",
        )
        require(not pairs or self.responses_per_prompt > 1, "responses_per_prompt: online dpo needs at least 2")
        require(
            self.train_batch % self.learnt_together == 0,
            f"train_batch: {self.train_batch} is no multiple of responses_per_prompt {self.responses_per_prompt}: in "
            "an update online dpo compares all responses of a prompt",
        )

    def _check_engine(self) -> None:
        require(
            not (self.park_frozen and self.partition_frozen == "yes"),
            "partition_frozen: a model is either partitioned or parked; leave one of park_frozen and it out",
        )
        taken_apart = "--zero-stage 3" if self.zero_stage == 3 else "--partition-frozen yes"
        require(
            self.frozen_dtype == "off" or (self.zero_stage < 3 and self.partition_frozen != "yes"),
            f"frozen_dtype: {self.frozen_dtype} weights cannot be spread over ranks; leave out {taken_apart}, or use "
            "--frozen-dtype off",
        )
        for name in ("vllm_url", "vllm_devices"):
            given = getattr(self, name)
            require(
                not given or self.rollout_engine == "vllm-serve",
                f"{name}: is for --rollout-engine vllm-serve, not {self.rollout_engine!r}",
            )
            once = len({one.rstrip("/") for one in given}) == len(given)
            require(once, f"{name}: one of {', '.join(redacted(given))} comes twice")
        require(
            not (self.vllm_url and self.vllm_devices), "vllm_devices: for servers that the recipe starts, not vllm_url"
        )
        require(
            self.vllm_tensor_parallel == 1 or self.rollout_engine == "vllm",
            f"vllm_tensor_parallel: is for --rollout-engine vllm, not {self.rollout_engine!r}",
        )
        require(
            not self.rollout_oversample or self.rollout_engine != "vllm-serve",
            "rollout_oversample: servers answer in no fixed order, so what is dropped would change from run to run; "
            "use another --rollout-engine, or 0",
        )
        require(
            not self.rollout_lag or self.rollout_engine == "vllm-serve",
            f"rollout_lag: an engine in the training process ({self.rollout_engine!r}) cannot sample while it trains; "
            "use --rollout-engine vllm-serve",
        )
        require(
            self.behaviour == "trainer" or self.policy_update == "ppo",
            f"behaviour_logp: {self.policy_update} has no correction for the sampler; use trainer and --rollout-lag 0",
        )
        for url in self.vllm_url:
            require(not (fault := _fault_of(url)), f"vllm_url: {without_credentials(url)!r} {fault}")

    def _check_variants(self) -> None:
        grouped, pairs = self.advantage in ("grpo", "rloo", "q"), self.policy_update in ("p3o", "rebel")
        for wrong, message in (
            (
                self.credit != "token" and not self.pays_tokens,
                f"credit: beta1 = 0 has no token rewards for {self.credit!r}",
            ),
            (self.pays_tokens and not self.token_sources, "token_reward: no source; for none pass --beta1 0"),
            (self.credit == "sentence" and not all(self.delimiters), "delimiters: an empty string ends no sentence"),
            (self.credit == "sentence" and not self.delimiters, "delimiters: credit 'sentence' needs at least one"),
            (self.segment_entropy < 0, f"segment_entropy: must not be negative, got {self.segment_entropy}"),
            (grouped and self.responses_per_prompt < 2, f"responses_per_prompt: {self.advantage} needs at least 2"),
            (
                self.advantage == "q" and self.gamma != 1,
                f"gamma: q discounts nothing; leave it at 1, got {self.gamma}",
            ),
            (
                self.advantage == "q" and self.credit != "token",
                f"credit: q takes a token's own reward for its advantage, and {self.credit!r} pays it elsewhere; use "
                "token, or another --advantage",
            ),
            (pairs and self.responses_per_prompt != 2, f"responses_per_prompt: {self.policy_update} needs exactly 2"),
            (pairs and self.train_batch % 2, f"train_batch: must be even, {self.policy_update} takes pairs"),
            (pairs and self.advantage != "gae", f"advantage: {self.policy_update} compares responses and uses none"),
            (pairs and self.entropy_coef, f"entropy_coef: {self.policy_update} has no entropy bonus; set it to 0"),
            (
                self.p3o_clip != "joint" and self.policy_update != "p3o",
                f"p3o_clip: is for --policy-update p3o, not {self.policy_update}",
            ),
            (not self.rebel_eta > 0, f"rebel_eta: must be positive, got {self.rebel_eta}"),
        ):
            require(not wrong, message)
        for name, off in (("critic", "auto"), ("critic_warmup", 0), ("truncation", "zero")):
            value, method = getattr(self, name), self.policy_update if pairs else self.advantage
            require(self.uses_critic or value == off, f"{name}: {value!r} needs a critic, and {method} has none")


def _fault_of(url: str) -> str:
    """Why no vLLM server can be asked at `url`; empty when one can."""
    import httpx  # here alone: nothing else of this file waits for it

    if url.startswith("unix:"):
        path = url.removeprefix("unix:")
        if not path.startswith("/"):
            return "must name the socket by its whole path, as unix:/run/user/1000/vllm/socket"
        size = len(os.fsencode(path))
        return f"has a path of {size} bytes, a socket's has {SOCKET_BYTES} at most" if size > SOCKET_BYTES else ""
    if not url.startswith(("http://", "https://")):
        return "must start with http://, https:// or unix:/"
    try:
        host = httpx.URL(url).host
    except httpx.InvalidURL:  # its words may hold a part of a password
        return f"is no URL; {ENCODED}"
    if not host:
        return "names no host"
    return "must end before its query or fragment: paths are put behind it" if "?" in url or "#" in url else ""
