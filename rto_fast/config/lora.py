"""Settings of LoRA adapters, for every stage that can train one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from rto_fast.errors import require

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Lora:
    """An adapter to train, as PEFT is told; the fields are those of `LoraSettings`."""

    rank: int
    alpha: int
    dropout: float
    targets: tuple[str, ...]
    rslora: bool
    dora: bool
    seed: int
    """Of the first values."""
    base_dtype: str = "off"
    """What the base's linear maps are held in; off: the run's dtype."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Flags of an adapter."""

    lora_rank: int = 0
    """Rank of a LoRA adapter that is trained in place of the weights; 0 = off, whole weights are trained. An adapter's
    folder may stand wherever a model may: with a rank its training goes on, without one it is merged when loaded."""
    lora_alpha: int = 32
    """Scale of the adapter: its product is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Probability that an input of the adapter is dropped in training; 0 = off."""
    lora_targets: tuple[str, ...] = (ALL_LINEAR,)
    """Names of the linear maps that get an adapter, such as `q_proj v_proj`; all-linear: all but the lm_head and reward
    heads."""
    lora_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_rank) (arXiv 2312.03732)."""
    lora_dora: bool = False
    """Train the size of each output's weights apart from their direction (DoRA, arXiv 2402.09353)."""

    lora_base_dtype: Literal["off", "int8", "nf4"] = "off"
    """Hold the linear maps of the base under adapters in 8 or 4 bits (QLoRA, arXiv 2305.14314; the extra `quant`); the
    adapters stay in dtype. off: the base in dtype, too."""

    @property
    def lora(self) -> Lora | None:
        """The adapter to train; None where whole weights are."""
        if not self.lora_rank:
            return None
        return Lora(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets, self.lora_rslora,
                    self.lora_dora, getattr(self, "seed", 0), self.lora_base_dtype)  # fmt: skip

    def check_lora(self) -> None:
        """Raises ConfigError on settings that contradict each other."""
        require(self.lora_rank >= 0, f"lora_rank: must not be negative, got {self.lora_rank}")
        require(self.lora_alpha >= 1, f"lora_alpha: must be at least 1, got {self.lora_alpha}")
        require(0 <= self.lora_dropout < 1, f"lora_dropout: must lie in [0, 1), got {self.lora_dropout}")
        require(bool(self.lora_targets), f"lora_targets: must name a module; {ALL_LINEAR} names all linear maps")
        require(
            ALL_LINEAR not in self.lora_targets or len(self.lora_targets) == 1,
            f"lora_targets: {ALL_LINEAR} names all linear maps already; leave {ALL_LINEAR} out, or the others",
        )
        for field in dataclasses.fields(self):
            changed, own = getattr(self, field.name) != field.default, field.name.startswith("lora_")
            require(
                self.lora_rank > 0 or not (own and changed),
                f"{field.name}: is for adapters; pass --lora-rank too, such as 16, or leave it out",
            )
            rate = f"lora_{field.name}"
            require(
                not self.lora_rank or not changed or not (field.name.endswith("lr") and hasattr(self, rate)),
                f"{field.name}: {getattr(self, field.name)} is of whole weights; pass --{rate.replace('_', '-')}, the "
                "adapter's, or leave it out",
            )
        if self.lora_base_dtype != "off":
            self._check_coded_base()

    def _check_coded_base(self) -> None:
        kind = self.lora_base_dtype
        require(
            not self.lora_dora,
            f"lora_dora: reads the base's weights at every step, which {kind} would decode each time; leave out "
            "--lora-dora, or use --lora-base-dtype off",
        )
        require(
            getattr(self, "zero_stage", 0) < 3,
            f"lora_base_dtype: {kind} weights cannot be spread over ranks; leave out --zero-stage 3, or use "
            "--lora-base-dtype off",
        )
