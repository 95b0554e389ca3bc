"""Every setting and its default, one frozen dataclass a stage. Zero means off.

The defaults are the paper's for Llama-3-8B on UltraFeedback (arXiv 2404.18922). A recipe changes a default by
constructing the config with another value; a user changes it by a flag of the field's name.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from rto_fast.errors import ConfigError, require
from rto_fast.redact import ENCODED, redacted, without_credentials
from rto_fast.token_spec import TokenSpec

TEMPLATE_DATE = "2024-07-26"
"""The day that chat templates write who ask for today's date: the one that Llama-3.1's falls back to."""
FREE = "a resumed run may change it"
SOCKET_BYTES = 107
"""Of the path of a Unix socket at most."""
T = TypeVar("T")


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


def free(default: T) -> T:
    """A field whose value a resumed run may change.

    Such a setting changes nothing that is learnt, or its rounding alone: a run that has used up its memory must be
    able to go on with less.
    """
    return dataclasses.field(default=default, metadata={FREE: True})


PATHS = (
    "output_dir", "model", "policy", "reference", "dpo_model", "dpo_ref", "reward_model", "reward_fn", "output",
    "generator", "run", "guide_model", "guide_base",
)  # fmt: skip
"""Fields that may hold a path; data and templates are opened with theirs."""


def expand_home(config: Any) -> None:
    """Replaces the `~` that a path of a frozen config begins with by the home folder."""
    for name in PATHS:
        value = getattr(config, name, ())
        home = os.path.expanduser(value) if isinstance(value, str) else tuple(map(os.path.expanduser, value))
        if home != value:
            object.__setattr__(config, name, home)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of every stage."""

    output_dir: str = free("runs/run")
    """Folder for checkpoints, logs, the report and the exported model."""
    seed: int = 0
    """Seed of data order, initial heads and sampling."""
    resume: Literal["auto", "never"] = free("never")
    """auto: go on from the newest checkpoint in output_dir, or start when there is none."""
    trust_run_folder: bool = free(False)
    """Resume from checkpoints that another user owns: they are pickles, and reading one can run its writer's code."""
    save_every: int = free(0)
    """Optimiser steps (RTO: iterations) between checkpoints; 0 = by time, see save_minutes."""
    save_minutes: float = free(15.0)
    """Minutes between checkpoints where save_every is 0; 0 = only the final export. Where saving would take over a
    tenth of the run, they are fewer."""
    keep_last: int = free(2)
    """Checkpoints kept, the newest ones."""
    max_bad_steps: int = free(5)
    """Non-finite losses, rewards or gradients in a row before the run stops with a diagnosis; 0 = never."""
    log_every: int = free(1)
    """Steps between log rows."""
    wandb_project: str = free("")
    """Weights & Biases project; empty = off."""

    # Devices and memory
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute type of forward and backward; the optimiser keeps fp32 weights either way."""
    attention: Literal["auto", "flash_attention_2", "varlen", "sdpa"] = free("auto")
    """Packed attention: auto takes flash-attn where installed, else PyTorch's own."""
    packing: Literal["on", "off"] = free("on")
    """on: sequences lie side by side in one row; a model that is not exact so is refused. off: one sequence a row,
    slower, and right for every family."""
    gradient_checkpointing: bool = free(True)
    """Recompute activations in the backward pass: less memory, about a third more time."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage; 0 only with dtype fp32."""
    offload: bool = False
    """Keep optimiser states in host memory."""
    router_aux_coef: float = 0.0
    """Mixtures of experts: weight of the router's auxiliary loss, which spreads tokens over the experts, in SFT, reward
    model, DPO and the policy's updates (not the critic's). Of each micro-batch, weighted by its tokens. Models' own
    configs name .001 to .01; 0 = off."""
    micro_tokens: int = free(16384)
    """Tokens a training micro-batch holds at most on one rank (a longer sequence goes alone)."""

    # Optimiser (AdamW)
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's beta1 and beta2."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; 0 = off."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 = off."""
    warmup_ratio: float = 0.03
    """Share of all optimiser steps in linear warm-up."""
    lr_floor: float = 0.1
    """Learning rate at the end of the cosine, as a share of the peak."""

    # Data
    data: str = ""
    """Hub id, local .jsonl/.json/.parquet/.csv file, or a folder saved by `datasets`."""
    data_split: str = "train"
    """Split of a Hub data set or saved folder."""
    max_rows: int = 0
    """Rows used of each data set, from the first; 0 = all."""
    chat_template: str = "auto"
    """auto: the tokenizer's own, else the plain one; plain; or the path of a Jinja file."""
    template_date: str = TEMPLATE_DATE
    """YYYY-MM-DD: the day that a chat template writes where it asks for today's date (Llama-3.1's does). One day for
    all stages, so that they agree whenever they run."""
    overlong: Literal["refuse", "skip", "truncate"] = "skip"
    """What happens to rows over the length limit, counted either way. truncate cuts responses, never prompts."""
    invalid_rows: Literal["refuse", "skip", "skip_empty"] = "refuse"
    """What happens to rows with a missing key, empty or non-string text, or chosen = rejected, counted either way.
    skip_empty: those of empty text and those with chosen = rejected are left out, any other is refused."""
    data_workers: int = free(0)
    """Processes that tokenise; 0 = one a core, at most 16."""
    data_cache: bool = free(True)
    """Keep the tokenised rows on disk and use them again."""

    def __post_init__(self) -> None:
        expand_home(self)

    def validate(self) -> None:
        """Raises ConfigError on settings that contradict each other; needs no file and no device."""
        require(bool(self.data), "data: no data set given; pass --data (Hub id, local file or saved folder)")
        require(bool(self.output_dir), "output_dir: must not be empty")
        require(
            not (self.zero_stage == 0 and self.dtype == "bf16"),
            "zero_stage: stage 0 with dtype bf16 keeps no fp32 weights and diverges; use --zero-stage 1, 2 or 3, "
            "or --dtype fp32",
        )
        require(
            not (self.offload and self.zero_stage == 0),
            "offload: needs ZeRO; use --zero-stage 1, 2 or 3",
        )
        require(
            not (self.packing == "off" and self.attention == "varlen"),
            "attention: varlen is a kernel for packed rows; with --packing off use --attention auto",
        )
        for name in ("micro_tokens", "keep_last", "log_every"):
            require(getattr(self, name) >= 1, f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in (
            "save_every",
            "save_minutes",
            "max_rows",
            "max_bad_steps",
            "router_aux_coef",
            "weight_decay",
            "max_grad_norm",
            "data_workers",
        ):
            require(getattr(self, name) >= 0, f"{name}: must not be negative, got {getattr(self, name)}")
        for name in ("warmup_ratio", "lr_floor"):
            require(0 <= getattr(self, name) <= 1, f"{name}: must lie in [0, 1], got {getattr(self, name)}")
        require(all(0 <= b < 1 for b in self.adam_betas), f"adam_betas: must lie in [0, 1), got {self.adam_betas}")
        for name, value in dataclasses.asdict(self).items():
            for number in value if isinstance(value, tuple | list) else (value,):
                require(not isinstance(number, float) or math.isfinite(number), f"{name}: must be finite, got {number}")

    def micro_budget(self, tokens: int) -> int:
        """Tokens that micro-batches of at most `tokens` are planned with: without packing every row goes alone."""
        return tokens if self.packing == "on" else 1

    def fingerprint(self) -> dict[str, object]:
        """The settings a checkpoint must share with the run that resumes it: all but those made by `free`.

        URLs stand there without credentials, which may change and are nobody's to read.
        """
        fixed = [f.name for f in dataclasses.fields(self) if not f.metadata.get(FREE)]
        values = dataclasses.asdict(self)
        return redacted({name: values[name] for name in fixed})


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(RunConfig):
    """Settings that SFT, reward model and DPO share."""

    model: str = ""
    """Model folder or Hub id to start from."""
    lr: float = 5e-7
    """Peak learning rate."""
    batch: int = 128
    """Rows an optimiser step, over all ranks."""
    epochs: float = 1.0
    """Passes over the training rows."""
    max_length: int = 2048
    """Tokens of prompt + response at most."""
    eval_fraction: float = 0.05
    """Share of the rows held out for evaluation (when there is neither eval_data nor an eval_split of `data`)."""
    eval_data: str = ""
    """Data set to evaluate on; empty = `data` (its eval_split, else its held-out share)."""
    eval_split: str = ""
    """Split to evaluate on; empty = data_split of eval_data, or the held-out share of `data`. A file has no splits, and
    its held-out share is taken."""
    prompt_key: str = "prompt"
    """Column of the prompt (string or message list)."""

    def validate(self) -> None:
        super().validate()
        require(bool(self.model), "model: no model given; pass --model (folder or Hub id)")
        require(self.lr > 0, f"lr: must be positive, got {self.lr}")
        require(self.batch >= 1, f"batch: must be at least 1, got {self.batch}")
        require(self.epochs > 0, f"epochs: must be positive, got {self.epochs}")
        require(self.max_length >= 2, f"max_length: must be at least 2 tokens, got {self.max_length}")
        require(
            not self.eval_split or bool(self.eval_data) or self.eval_split != self.data_split,
            f"eval_split: {self.eval_split!r} is data_split too, which is trained on; choose another, or eval_data",
        )
        require(0 <= self.eval_fraction < 1, f"eval_fraction: must lie in [0, 1), got {self.eval_fraction}")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning on responses."""

    lr: float = 1e-5
    batch: int = 32
    response_key: str = "auto"
    """Column of the response; auto: `response`, `completion`, `messages` or `chosen`, whichever is there first."""


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(SupervisedConfig):
    """Settings that the reward model and DPO share."""

    chosen_key: str = "chosen"
    """Column of the preferred response (string or message list)."""
    rejected_key: str = "rejected"
    """Column of the other response."""


@dataclass(frozen=True, kw_only=True)
class RMConfig(PreferenceConfig):
    """Bradley-Terry reward model (sequence classification, one output)."""

    lr: float = 1e-6
    batch: int = 128
    margin_weight: float = 0.0
    """Weight of the margin by which the data say that chosen should win: column `margin`, else `score_chosen` -
    `score_rejected`; 0 = off."""

    def validate(self) -> None:
        super().validate()
        require(self.margin_weight >= 0, f"margin_weight: must not be negative, got {self.margin_weight}")


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PreferenceConfig):
    """Direct preference optimisation and its relatives: the token reward's source."""

    lr: float = 5e-7
    batch: int = 256
    """Rows an optimiser step, over all ranks (KTO: single answers)."""
    objective: Literal["dpo", "r_dpo", "simpo", "tdpo1", "tdpo2", "tgdpo", "tis_dpo", "kto", "ipo", "mppo"] = "dpo"
    """Loss; formulas in preference.py. mppo takes all rows of one prompt and chosen as one with N negatives."""
    beta: float = 0.1
    """Strength of the pull to the reference (all but simpo and mppo)."""
    label_smoothing: float = 0.0
    """dpo: probability that a label is wrong (cDPO), below 0.5; 0 = off."""
    nll_coef: float = 0.0
    """dpo: weight of the mean negative log-prob of chosen's tokens, added to the loss; 0 = off."""
    r_dpo_alpha: float = 0.01
    """r_dpo: margin for each token that chosen is longer, nats; 0 = DPO."""
    simpo_beta: float = 2.5
    """simpo: scale of the mean log-prob of a token."""
    simpo_gamma: float = 0.5
    """simpo: margin by which chosen should win; 0 = off."""
    tdpo_alpha: float = 0.5
    """tdpo2: weight of the difference of sequential KLs; 0 = DPO."""
    guide_model: str = ""
    """tgdpo, tis_dpo: model on the same tokens whose log-ratio weighs each token, such as an earlier DPO model."""
    guide_base: str = ""
    """tis_dpo: the log-ratio's denominator, such as a DPO model on swapped pairs; empty = the reference."""
    tgdpo_alpha: float = 0.5
    """tgdpo: how much the guide's log-ratio, scaled by beta, moves a token's weight; 0 = DPO."""
    tis_low: float = -0.5
    """tis_dpo: least log-ratio of the guide, nats."""
    tis_high: float = 1.5
    """tis_dpo: largest log-ratio of the guide, nats."""
    kto_desirable_weight: float = 1.0
    """kto: weight of desirable answers (w_D)."""
    kto_undesirable_weight: float = 1.0
    """kto: weight of undesirable answers (w_U)."""
    completion_key: str = "completion"
    """kto: column of a single answer, where the data have no pairs."""
    label_key: str = "label"
    """kto: column that says whether the answer is desirable (true or 1)."""
    reference: str = ""
    """Reference model; empty = `model` before training."""

    def validate(self) -> None:
        super().validate()
        require(
            not (self.objective == "mppo" and self.packing == "off" and self.zero_stage == 3),
            "packing: off with objective mppo, whose rows hold more or fewer answers, needs --zero-stage 0, 1 or 2",
        )
        for name in ("beta", "simpo_beta"):
            require(getattr(self, name) > 0, f"{name}: must be positive, got {getattr(self, name)}")
        require(0 <= self.label_smoothing < 0.5, f"label_smoothing: must lie in [0, 0.5), got {self.label_smoothing}")
        for name in ("label_smoothing", "nll_coef"):
            require(
                self.objective == "dpo" or not getattr(self, name),
                f"{name}: is for --objective dpo, not {self.objective}",
            )
        for name in (
            "nll_coef",
            "r_dpo_alpha",
            "simpo_gamma",
            "tdpo_alpha",
            "tgdpo_alpha",
            "kto_desirable_weight",
            "kto_undesirable_weight",
        ):
            require(getattr(self, name) >= 0, f"{name}: must not be negative, got {getattr(self, name)}")
        self._check_guide()

    def _check_guide(self) -> None:
        guided = self.objective in ("tgdpo", "tis_dpo")
        require(not guided or bool(self.guide_model), f"guide_model: --objective {self.objective} needs one, such as a "
                "model that --objective dpo has trained")  # fmt: skip
        for name, wanted in (("guide_model", ("tgdpo", "tis_dpo")), ("guide_base", ("tis_dpo",))):
            fits = self.objective in wanted or not getattr(self, name)
            require(fits, f"{name}: is for --objective {' or '.join(wanted)}, not {self.objective}")
        bounds = f"[{self.tis_low}, {self.tis_high}]"
        require(self.tis_low < self.tis_high, f"tis_low: must be below tis_high, got {bounds}")


@dataclass(frozen=True, kw_only=True)
class RTOConfig(RunConfig):
    """Reinforced Token Optimization; beta1 = 0 is PPO."""

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
    """Bound on |score|; 0 = off."""
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
    """online: peak learning rate of the DPO model."""
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
    bits; scoring waits for the links. auto: under zero_stage 3, and with several ranks on GPUs unless park_frozen."""
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
    advantage: Literal["gae", "reinforce_pp", "grpo", "rloo", "returns"] = "gae"
    """Estimator; only gae has a critic, grpo and rloo compare responses_per_prompt >= 2 responses, returns takes the
    reward still to come as it is."""
    policy_update: Literal["ppo", "p3o", "rebel"] = "ppo"
    """p3o (joint clip of the pair's ratio) and rebel compare two responses to each prompt, without a critic."""
    rebel_eta: float = 1.0
    """rebel: scale of the log-ratio's difference; smaller moves less for the same rewards."""
    train_batch: int = 128
    """Responses a policy update, over all ranks."""
    ppo_epochs: int = 1
    """Passes over each rollout."""
    policy_lr: float = 5e-7
    """Peak learning rate of the policy."""
    critic_lr: float = 9e-6
    """Peak learning rate of the critic."""
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
    def token_sources(self) -> tuple[tuple[TokenSpec, float], ...]:
        """The sources of token rewards and their weights, without those that are off."""
        weights = self.token_reward_weight or (1.0,) * len(self.token_reward)
        specs = map(TokenSpec.parse, self.token_reward)
        return tuple((s, w) for s, w in zip(specs, weights, strict=True) if w and self.beta1)

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

    def __post_init__(self) -> None:
        super().__post_init__()
        one = (self.dpo_model,) if isinstance(self.dpo_model, str) else self.dpo_model
        object.__setattr__(self, "dpo_model", tuple(filter(None, one)))

    def validate(self) -> None:
        super().validate()
        require(bool(self.policy), "policy: no model given; pass --policy (folder or Hub id)")
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
            "vllm_start_timeout_s", "online_lr", "online_beta",
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
            bool(self.beta1) or self.token_reward in ((), default),
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
        grouped, pairs = self.advantage in ("grpo", "rloo"), self.policy_update in ("p3o", "rebel")
        for wrong, message in (
            (self.credit != "token" and not self.beta1, f"credit: beta1 = 0 has no token rewards for {self.credit!r}"),
            (bool(self.beta1) and not self.token_sources, "token_reward: no source; for none pass --beta1 0"),
            (self.credit == "sentence" and not all(self.delimiters), "delimiters: an empty string ends no sentence"),
            (self.credit == "sentence" and not self.delimiters, "delimiters: credit 'sentence' needs at least one"),
            (self.segment_entropy < 0, f"segment_entropy: must not be negative, got {self.segment_entropy}"),
            (grouped and self.responses_per_prompt < 2, f"responses_per_prompt: {self.advantage} needs at least 2"),
            (pairs and self.responses_per_prompt != 2, f"responses_per_prompt: {self.policy_update} needs exactly 2"),
            (pairs and self.train_batch % 2, f"train_batch: must be even, {self.policy_update} takes pairs"),
            (pairs and self.advantage != "gae", f"advantage: {self.policy_update} compares responses and uses none"),
            (pairs and self.entropy_coef, f"entropy_coef: {self.policy_update} has no entropy bonus; set it to 0"),
            (not self.rebel_eta > 0, f"rebel_eta: must be positive, got {self.rebel_eta}"),
        ):
            require(not wrong, message)
        for name, off in (("critic", "auto"), ("critic_warmup", 0), ("truncation", "zero")):
            value, method = getattr(self, name), self.policy_update if pairs else self.advantage
            require(self.uses_critic or value == off, f"{name}: {value!r} needs a critic, and {method} has none")


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
    beta2: float = 1.0
    """Scale of the KL against the base, and so of the whole objective; beta1 is scale times it."""
    beta3: float = 0.0
    """Scale of the response's score at its last token; 0 = no reward model."""
    dpo_clip: float = 0.0
    """Bound on |beta1 * log(pi_teacher / pi_base)| of a token (reward units); 0 = off."""
    advantage: Literal["gae", "reinforce_pp", "grpo", "rloo", "returns"] = "returns"
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
        object.__setattr__(self, "reference", self.base or self.reference)
        object.__setattr__(self, "beta1", self.scale * self.beta2)

    def validate(self) -> None:
        require(bool(self.teacher), "teacher: no model given; pass --teacher (folder or Hub id)")
        require(":" not in self.teacher, f"teacher: {self.teacher!r} must not have a colon")
        require(self.scale > 0, f"scale: must be positive, got {self.scale}")
        require(self.beta2 > 0, f"beta2: scales the whole objective, must be positive, got {self.beta2}")
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
    beta1: float = 0.0
    """Scale of the token rewards; 0 = 0.05 where --dpo-model or --token-reward names one, else none."""
    beta2: float = 0.001
    """Scale of the KL penalty log(pi / pi_ref); 0 = off."""
    advantage: Literal["gae", "reinforce_pp", "grpo", "rloo", "returns"] = "rloo"
    """Estimator; only gae has a critic, grpo and rloo compare responses_per_prompt >= 2 responses, returns takes the
    reward still to come as it is."""
    rollout_batch: int = 128
    """Prompts a rollout, over all ranks."""
    responses_per_prompt: int = 8
    """Responses sampled from each prompt."""
    train_batch: int = 256
    """Responses a policy update, over all ranks."""
    policy_lr: float = 1e-6
    """Peak learning rate of the policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = RTOConfig()
        if not self.beta1 and (self.dpo_model or self.token_reward != plain.token_reward):
            object.__setattr__(self, "beta1", plain.beta1)

    def validate(self) -> None:
        require(
            bool(self.data),
            f"data: no problems given; pass --data (rows with the columns {self.prompt_key!r} and 'answer'), or try "
            "rto-fast arithmetic, which makes its own",
        )
        super().validate()


def check_wandb(project: str) -> None:
    """ConfigError when W&B is asked for and not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb_project: wandb is not installed; pip install 'rto-fast[wandb]', or leave it out")
