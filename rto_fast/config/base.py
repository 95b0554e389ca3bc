"""What every stage can be told, and which settings a resumed run may change."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from rto_fast.errors import ConfigError, require
from rto_fast.redact import redacted

TEMPLATE_DATE = "2024-07-26"
"""The day that chat templates write who ask for today's date: the one that Llama-3.1's falls back to."""
FREE = "a resumed run may change it"
T = TypeVar("T")


def free(default: T) -> T:
    """A field whose value a resumed run may change.

    Such a setting changes nothing that is learnt, or its rounding alone: a run that has used up its memory must be
    able to go on with less.
    """
    return dataclasses.field(default=default, metadata={FREE: True})


SMALL_MODEL = 300_000_000
"""Parameters up to which `gradient_checkpointing` auto keeps the activations: some 10 GB of them at GPT-2 medium's size
and the default micro_tokens."""


FOLLOWS = "what it follows from"


def follows(default: T, why: str) -> T:
    """A field that a preset works out from others, so that it is no flag; why: what to pass instead."""
    return dataclasses.field(default=default, init=False, metadata={FOLLOWS: why})


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
    gradient_checkpointing: Literal["auto"] | bool = free("auto")
    """Recompute activations in the backward pass: less memory, about a third more time. auto: where a model has over
    300 million parameters."""
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
    """Hub id, local .jsonl/.json/.parquet/.csv file, or a folder: saved by `datasets`, or a copy of a data set's
    repository. A configuration stands behind a colon: openai/gsm8k:main."""
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

    def recomputes(self, parameters: int) -> bool:
        """Whether a trained model of so many parameters computes its activations again in the backward pass."""
        auto = parameters > SMALL_MODEL
        return auto if self.gradient_checkpointing == "auto" else self.gradient_checkpointing

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


def check_wandb(project: str) -> None:
    """ConfigError when W&B is asked for and not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb_project: wandb is not installed; pip install 'rto-fast[wandb]', or leave it out")
