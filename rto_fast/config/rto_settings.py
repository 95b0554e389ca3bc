"""Settings of the loop, and what follows from them; rto.py says which go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rto_fast.config.base import RunConfig, free
from rto_fast.config.lora import LoraSettings
from rto_fast.config.token_spec import TokenSpec


@dataclass(frozen=True, kw_only=True)
class RTOSettings(LoraSettings, RunConfig):
    """What RTOConfig holds."""

    # Models
    policy: str = ""
    """SFT model that the policy starts from (folder or Hub id)."""
    reference: str = ""
    """KL reference; empty = the policy's start."""
    dpo_model: tuple[str, ...] = ()
    """DPO model, the token reward's numerator; of several, the log-ratios are added up. Not loaded when beta1 = 0."""
    dpo_weight: tuple[float, ...] = ()
    """Weights of several DPO models' log-ratios, of either sign (1.3 -0.3 extrapolates from one round of DPO to the
    next); empty = their mean."""
    dpo_pessimism: float = 0.0
    """Deviations over the DPO models that are taken off each token's log-ratio; 0 = off."""
    dpo_ref: str = ""
    """The DPO models' own reference, the token reward's denominator; empty = the KL reference."""
    critic: Literal["auto", "reward", "policy"] = "auto"
    """Critic's start: the reward model, the SFT backbone with a zero head, or auto (reward where tokenizers agree)."""
    lora_critic: Literal["shared", "own"] = "shared"
    """With lora_rank, the critic stands on the policy's base in memory (shared) where its weights are the same ones, or
    on a copy."""
    lora_push: Literal["adapter", "merged"] = free("adapter")
    """With lora_rank, what a vLLM is pushed: the adapter alone, for vLLM's own LoRA where that can compute with it, or
    whole weights with the adapter merged."""

    # Rewards of whole responses
    reward_model: tuple[str, ...] = ()
    """Sequence-classification reward models (folders or Hub ids)."""
    reward_fn: tuple[str, ...] = ()
    """Python reward functions, module:function, called with those of prompts, responses, token_ids, messages and the
    data's columns that they name -> list of a number, or (number, {metric: number}), a response."""
    reward_url: tuple[str, ...] = ()
    """Remote reward models (HTTP POST, OpenRLHF's protocol; its labels are the data's column labels or label)."""
    reward_weight: tuple[float, ...] = ()
    """Weights of the sources in the order models, functions, URLs; empty = 1 each."""
    reward_timeout_s: float = free(60.0)
    """Seconds that one attempt of a remote reward request may take in all."""
    reward_retries: int = free(4)
    """Attempts after a failed remote request."""

    # Token reward (Eq. 4.7)
    token_reward: tuple[str, ...] = ("dpo",)
    """Sources of token rewards, added up: dpo, logratio:MODEL[:BASE], endogenous[:MODEL], scalar:MODEL,
    scalar-diff:MODEL, fn:module:function, url:URL."""
    token_reward_weight: tuple[float, ...] = ()
    """Weights of the sources, of either sign; empty = 1 each. A source of weight 0 is left out."""
    token_reward_alpha: float = 1.0
    """endogenous: its entropy coefficient alpha."""
    beta1: float = 0.05
    """Scale of the token rewards, log(pi_dpo / pi_ref) by default; 0 = PPO, their models are not loaded."""
    beta2: float = 0.01
    """Scale of the KL penalty log(pi / pi_ref); 0 = off."""
    beta3: float = 1.0
    """Scale of the response's score at its last token; 0 = off."""
    dpo_clip: float = 0.05
    """Bound on |beta1 * log(pi_dpo / pi_ref)| of a token, and on every other source's (reward units); 0 = off."""
    score_clip: float = 10.0
    """Bound on |score|, after `score_scale`; 0 = off."""
    score_scale: Literal["off", "running"] = "off"
    """running: divide the score by the deviation of all scores of the run so far, as PPO-max does."""
    kl_target: float = 0.0
    """Adaptive KL: beta2 is steered to this mean KL of a token (nats); 0 = beta2 stays fixed."""
    kl_horizon: int = 10000
    """Adaptive KL: responses over which beta2 can change by about its own size."""

    credit: Literal["token", "sentence", "segment", "response", "shaped"] = "token"
    """Where the clipped token rewards are paid: RTO, Semi-RTO, evenly over a segment, DDPO, RS-PPO."""
    delimiters: tuple[str, ...] = (".", "!", "?")
    """credit sentence: what ends a sentence; the rest behind the last one is paid at the last token."""
    segment_entropy: float = 1.75
    """credit segment: nats; a token that the policy draws at a higher entropy begins a segment. 0 = each token does."""

    # Online token reward
    online: Literal["off", "prime", "dpo"] = "off"
    """Train the DPO model on every rollout: prime on each response's outcome (arXiv 2502.01456), dpo on each prompt's
    best response against its worst by score. It may then start from the SFT model. off: it stays as it is."""
    online_lr: float = 1e-6
    """online: peak learning rate of the DPO model's weights."""
    lora_online_lr: float = 1e-5
    """online: peak learning rate of the DPO model's adapter, in place of online_lr."""
    online_beta: float = 0.05
    """online: beta of its loss, the scale of a response's log(pi_dpo / pi_ref)."""
    online_order: Literal["before", "after"] = "before"
    """online: train the DPO model before the rollout's token rewards are read from it, for a forward more, or after."""
    online_outcome: Literal["auto", "binary", "sigmoid"] = "auto"
    """online prime: the outcome of a response. binary: whether its score is above a half, as a verifier's is; sigmoid:
    sigmoid(score), a reward model's probability; auto: binary where functions alone give the score."""
    online_patience: int = free(20)
    """online: iterations in a row whose accuracy is below a half before the run stops with a diagnosis; 0 = never."""

    # Rollout
    iterations: int = 0
    """Rollouts to do; 0 = what `epochs` passes over the prompts need."""
    epochs: float = 1.0
    """Passes over the prompts, when iterations = 0."""
    rollout_batch: int = 1024
    """Prompts a rollout, over all ranks."""
    responses_per_prompt: int = 1
    """Responses sampled from each prompt."""
    rollout_oversample: float = 0.0
    """Share of prompts drawn beyond rollout_batch; sampling stops when the batch is complete, and the prompts with
    responses still under way are dropped, which favours short ones. 0 = off."""
    temperature: float = 1.0
    """Sampling temperature; PPO's ratio uses it, KL and DPO terms use 1."""
    max_prompt_length: int = 1024
    """Tokens of a prompt at most."""
    max_response_length: int = 1024
    """Tokens sampled at most; a response cut here is `truncated`."""
    min_response_length: int = 0
    """Tokens before the one that may end a response: up to there the sampler leaves stop tokens out. The ratio, the KL
    and the DPO terms keep the policy's own log-probs. 0 = off."""
    rollout_engine: Literal["auto", "transformers", "vllm", "vllm-serve"] = "auto"
    """Engine that samples; auto: vLLM in this process where it is installed and knows the model, else transformers.
    vllm-serve: vLLM servers, in processes and on devices of their own."""
    rollout_timeout_s: float = free(1800.0)
    """Seconds a step of vLLM (vllm-serve: any response) may take before the engine counts as hung. In the training
    process a step that has not returned after twice that ends the run."""
    vllm_url: tuple[str, ...] = free(())
    """vllm-serve: running servers, http://HOST:PORT or unix:PATH of a socket; empty = the recipe starts its own.
    Whoever reaches a server can take it over: a socket in a folder of your own, or a private network only."""
    vllm_devices: tuple[str, ...] = free(())
    """vllm-serve: CUDA devices that the recipe starts a server on each; the trainer must not use them."""
    vllm_start_timeout_s: float = free(600.0)
    """vllm-serve: seconds until a server must answer."""
    sync_proof: bool = free(True)
    """Show at the start that weights pushed to the engine reach its log-probs, and set the limits of later checks."""
    vllm_memory_share: float = free(0.4)
    """Share of the device's memory for vLLM's weights and cache (on a CPU: of the free memory, for the cache)."""
    vllm_tensor_parallel: int = free(1)
    """Ranks in a row that hold one vLLM together, a part of every matrix each; must divide the ranks. For a model that
    does not fit beside the trainer on one device."""
    vllm_max_sequences: int = free(256)
    """Sequences one vLLM samples at once."""
    vllm_prefix_caching: bool = free(True)
    """Responses to one prompt share its keys and values."""
    vllm_cuda_graphs: bool = free(True)
    """Replay decoding steps as CUDA graphs: faster, at some memory and start-up time."""
    rollout_lag: Literal[0, 1] = 0
    """1: the next batch is sampled while this one trains, so by the policy of one iteration before; vllm-serve only."""
    behaviour_logp: Literal["trainer", "sampler"] = "trainer"
    """Whose log-probs are the behaviour policy's. trainer: a forward of its own. sampler: that forward is skipped, and
    truncated importance sampling corrects the update; always so with rollout_lag 1. At a temperature other than 1 the
    KL term still needs the forward: the sampler knows its log-probs at the sampling temperature only."""
    is_cap: float = 2.0
    """Bound on the importance weight exp(old_logp - sampler_logp) of a token; 0 = off."""
    rollout_tokens: int = free(65536)
    """Tokens (prompt + response) the transformers engine samples at once on one rank."""
    park_frozen: bool = free(False)
    """Keep reference, DPO and reward models in host memory, where they are not partitioned; scoring brings them to the
    device one at a time."""
    partition_frozen: Literal["auto", "yes", "no"] = free("auto")
    """Spread reference, DPO and reward models over the ranks (ZeRO-3), whatever the stage of the trained ones: the same
    bits; scoring waits for the links. auto: under zero_stage 3, and with several ranks on GPUs unless park_frozen or
    frozen_dtype."""
    frozen_dtype: Literal["off", "int8", "nf4"] = "off"
    """Hold linear maps of reference, DPO and reward models in 8 or 4 bits (the extra `quant`); the error in token
    rewards is measured at the start. Models on the policy's base are held as lora_base_dtype says. off: in dtype."""
    memory_check: bool = free(True)
    """Refuse at the start what cannot fit on the GPUs by the arithmetic of `rto-fast memory`."""
    score_tokens: int = free(32768)
    """Tokens a scoring micro-batch holds at most on one rank."""
    truncation: Literal["zero", "bootstrap"] = "zero"
    """Value after a truncated response: 0, or the critic's."""
    truncated_reward: float | None = None
    """Score given to truncated responses instead of their own; None = their own, which a reward model gives at an end
    of turn put behind them."""
    prompt_key: str = "auto"
    """Column of the prompt; auto: `context_messages`, `prompt` or `instruction`, whichever is there first."""

    # Policy and critic
    advantage: Literal["gae", "reinforce_pp", "grpo", "rloo", "returns", "q"] = "gae"
    """Estimator; only gae has a critic, grpo, rloo and q compare responses_per_prompt >= 2 responses, returns takes the
    reward still to come as it is, q each token's own reward, and the score less the other responses'."""
    policy_update: Literal["ppo", "p3o", "rebel"] = "ppo"
    """p3o and rebel compare two responses to each prompt, without a critic."""
    p3o_clip: Literal["joint", "separate"] = "joint"
    """p3o: clip the ratio of the pair's two ratios, or each response's own as PPO does."""
    rebel_eta: float = 1.0
    """rebel: scale of the log-ratio's difference; smaller moves less for the same rewards."""
    train_batch: int = 128
    """Responses a policy update, over all ranks."""
    ppo_epochs: int = 1
    """Passes over each rollout."""
    policy_lr: float = 5e-7
    """Peak learning rate of the policy's weights."""
    lora_policy_lr: float = 5e-6
    """Peak learning rate of the policy's adapter, in place of policy_lr; ten times that, see lora_lr."""
    critic_lr: float = 9e-6
    """Peak learning rate of the critic's weights."""
    lora_critic_lr: float = 9e-5
    """Peak learning rate of the critic's adapter and head, in place of critic_lr."""
    gamma: float = 1.0
    """Discount a token."""
    lam: float = 0.95
    """GAE's lambda."""
    clip: float = 0.2
    """PPO's bound on |ratio - 1|."""
    value_clip: float = 0.2
    """Bound on the value's move in an update; 0 = off."""
    loss_aggregation: Literal["sequence", "token"] = "sequence"
    """Mean over a response's tokens, then responses (the paper's), or over all tokens."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0 = off."""
    ptx_coef: float = 0.0
    """Weight of the PTX loss (PPO-ptx), the mean negative log-prob of `ptx_data`'s response tokens, in the policy's
    loss; 0 = off."""
    ptx_data: str = ""
    """Supervised rows of the PTX loss, read as the sft recipe reads its data: a policy update takes as many of them as
    responses (train_batch), at most max_prompt_length + max_response_length tokens each."""
    ptx_split: str = ""
    """Split of ptx_data, a Hub data set or saved folder; empty = data_split."""
    ptx_prompt_key: str = "prompt"
    """ptx_data: column of the prompt (string or message list)."""
    ptx_response_key: str = "auto"
    """ptx_data: column of the response; auto: `response`, `completion`, `messages` or `chosen`, whichever is there
    first."""
    critic_warmup: int = 0
    """Iterations at the start that train the critic alone; 0 = off."""
    ema_decay: float = 0.0
    """Decay of an averaged policy, a step an iteration, exported as `ema`; 0 = off."""

    # Output
    report: bool = free(True)
    """Write report.html at the end; False saves a few seconds."""
    report_samples: int = free(16)
    """Sampled responses shown in report.html."""
    export_every: int = free(0)
    """Iterations between exports of policy and critic; 0 = only at the end."""

    @property
    def responses(self) -> int:
        """Responses a rollout, over all ranks."""
        return self.rollout_batch * self.responses_per_prompt

    @property
    def drawn_prompts(self) -> int:
        """Prompts drawn for a rollout, over all ranks; it keeps rollout_batch of them."""
        more = self.rollout_batch * self.rollout_oversample
        return self.rollout_batch + (max(1, round(more)) if more else 0)

    @property
    def uses_critic(self) -> bool:
        return self.policy_update == "ppo" and self.advantage == "gae"

    @property
    def behaviour(self) -> Literal["trainer", "sampler"]:
        """Whose log-probs the update takes for the behaviour policy's."""
        return "sampler" if self.rollout_lag else self.behaviour_logp

    @property
    def scores_policy(self) -> bool:
        """Whether scoring runs the policy over the rollout."""
        asked = self.credit == "segment"  # for its entropies
        return asked or self.behaviour_logp == "trainer" or self.rollout_lag > 0 or not self.samples_policy

    @property
    def samples_policy(self) -> bool:
        """Whether the sampler's distribution is the policy's: neither tempered nor without stop tokens."""
        return self.temperature == 1 and self.min_response_length == 0

    @property
    def compared_responses(self) -> int:
        """Responses that a policy update must see together."""
        return 1 if self.policy_update == "ppo" else 2

    @property
    def pays_tokens(self) -> bool:
        """Whether token rewards are asked for; without them the run is PPO."""
        return bool(self.beta1)

    @property
    def token_sources(self) -> tuple[tuple[TokenSpec, float], ...]:
        """The sources of token rewards and their weights, without those that are off."""
        weights = self.token_reward_weight or (1.0,) * len(self.token_reward)
        specs = map(TokenSpec.parse, self.token_reward)
        return tuple((s, w) for s, w in zip(specs, weights, strict=True) if w and self.pays_tokens)

    @property
    def other_token_sources(self) -> tuple[tuple[TokenSpec, float], ...]:
        """Those beside `dpo`."""
        return tuple((s, w) for s, w in self.token_sources if s.kind != "dpo")

    @property
    def dpo_scale(self) -> float:
        """beta1 times the weight of `dpo` among the token rewards; 0 = no DPO model is loaded."""
        return self.beta1 * sum(w for s, w in self.token_sources if s.kind == "dpo")

    @property
    def dpo_weights(self) -> tuple[float, ...]:
        return self.dpo_weight or (1 / len(self.dpo_model),) * len(self.dpo_model)

    @property
    def outcome(self) -> Literal["binary", "sigmoid"]:
        """How PRIME reads a score."""
        if self.online_outcome != "auto":
            return self.online_outcome
        return "sigmoid" if self.reward_model or self.reward_url else "binary"

    @property
    def learnt_together(self) -> int:
        """Responses that an update of the DPO model must see together."""
        return self.responses_per_prompt if self.online == "dpo" else 1

    @property
    def reward_sources(self) -> tuple[str, ...]:
        return self.reward_model + self.reward_fn + self.reward_url

    @property
    def reward_weights(self) -> tuple[float, ...]:
        return self.reward_weight or (1.0,) * len(self.reward_sources)
