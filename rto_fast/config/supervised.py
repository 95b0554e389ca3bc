"""Settings of SFT, the reward model and DPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rto_fast.config.base import RunConfig
from rto_fast.config.lora import LoraSettings
from rto_fast.errors import require


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(LoraSettings, RunConfig):
    """Settings that SFT, reward model and DPO share."""

    model: str = ""
    """Model folder or Hub id to start from."""
    lr: float = 5e-7
    """Peak learning rate of whole weights."""
    lora_lr: float = 5e-6
    """Peak learning rate of an adapter, in place of lr. Ten times the default of lr: the ratio of the best rates that
    "LoRA Without Regret" (Thinking Machines, 2025) finds over models and data, with lora_alpha 32 at any rank."""
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
        for name in ("lr", "lora_lr"):
            require(getattr(self, name) > 0, f"{name}: must be positive, got {getattr(self, name)}")
        self.check_lora()
        require(self.batch >= 1, f"batch: must be at least 1, got {self.batch}")
        require(self.epochs > 0, f"epochs: must be positive, got {self.epochs}")
        require(self.max_length >= 2, f"max_length: must be at least 2 tokens, got {self.max_length}")
        require(
            not self.eval_split or bool(self.eval_data) or self.eval_split != self.data_split,
            f"eval_split: {self.eval_split!r} is data_split too, which is trained on; choose another, or eval_data",
        )
        require(0 <= self.eval_fraction < 1, f"eval_fraction: must lie in [0, 1), got {self.eval_fraction}")

    @property
    def peak_lr(self) -> float:
        """The peak learning rate of what is trained."""
        return self.lora_lr if self.lora_rank else self.lr


@dataclass(frozen=True, kw_only=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning on responses."""

    lr: float = 1e-5
    lora_lr: float = 1e-4
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
    """Reward model (sequence classification, one output), of whole responses or of tokens."""

    lr: float = 1e-6
    lora_lr: float = 1e-5
    batch: int = 128
    objective: Literal["bradley_terry", "q_rm"] = "bradley_terry"
    """bradley_terry: the number at the last token is the response's score. q_rm (arXiv 2505.23363): the mean of the
    numbers at all response tokens is compared, which makes a token reward, --token-reward scalar:MODEL."""
    q_rm_beta: float = 0.2
    """q_rm: scale of the difference of means."""
    q_rm_gamma: float = 2.0
    """q_rm: margin by which chosen should win; 0 = off."""
    margin_weight: float = 0.0
    """Weight of the margin by which the data say that chosen should win: column `margin`, else `score_chosen` -
    `score_rejected`; 0 = off."""

    def validate(self) -> None:
        super().validate()
        require(self.q_rm_beta > 0, f"q_rm_beta: must be positive, got {self.q_rm_beta}")
        for name in ("margin_weight", "q_rm_gamma"):
            require(getattr(self, name) >= 0, f"{name}: must not be negative, got {getattr(self, name)}")
        for name in ("margin_weight",) if self.objective == "q_rm" else ("q_rm_beta", "q_rm_gamma"):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            more = "; its margin is --q-rm-gamma" if name == "margin_weight" else ""
            require(value == default, f"{name}: {value!r} is not read with --objective {self.objective}{more}")


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PreferenceConfig):
    """Direct preference optimisation and its relatives: the token reward's source."""

    lr: float = 5e-7
    lora_lr: float = 5e-6
    batch: int = 256
    """Rows an optimiser step, over all ranks (KTO: single answers)."""
    objective: Literal[
        "dpo", "r_dpo", "simpo", "tdpo1", "tdpo2", "tgdpo", "tis_dpo", "kto", "ipo", "mpo", "mppo"
    ] = "dpo"  # fmt: skip
    """Loss; formulas in preference.py. mppo takes all rows of one prompt and chosen as one with N negatives."""
    beta: float = 0.1
    """Strength of the pull to the reference (all but simpo and mppo); mpo: scale of the log-probs' difference."""
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
    mpo_keep: float = 0.1
    """mpo: weight of the mean log-prob of a token of both answers, which stand for the reference's own; 0 = off."""
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
            "mpo_keep",
            "tdpo_alpha",
            "tgdpo_alpha",
            "kto_desirable_weight",
            "kto_undesirable_weight",
        ):
            require(getattr(self, name) >= 0, f"{name}: must not be negative, got {getattr(self, name)}")
        self._check_read()
        self._check_guide()

    def _check_read(self) -> None:
        for name, readers in READERS.items():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            more = "; its scale is --simpo-beta" if (name, self.objective) == ("beta", "simpo") else ""
            require(
                self.objective in readers or value == default,
                f"{name}: {value!r} is not read with --objective {self.objective}{more}",
            )

    def _check_guide(self) -> None:
        guided = self.objective in ("tgdpo", "tis_dpo")
        require(not guided or bool(self.guide_model), f"guide_model: --objective {self.objective} needs one, such as a "
                "model that --objective dpo has trained")  # fmt: skip
        for name, wanted in (("guide_model", ("tgdpo", "tis_dpo")), ("guide_base", ("tis_dpo",))):
            fits = self.objective in wanted or not getattr(self, name)
            require(fits, f"{name}: is for --objective {' or '.join(wanted)}, not {self.objective}")
        bounds = f"[{self.tis_low}, {self.tis_high}]"
        require(self.tis_low < self.tis_high, f"tis_low: must be below tis_high, got {bounds}")


READERS = {
    "beta": ("dpo", "r_dpo", "tdpo1", "tdpo2", "tgdpo", "tis_dpo", "kto", "ipo", "mpo"),
    "r_dpo_alpha": ("r_dpo",), "mpo_keep": ("mpo",),
    "simpo_beta": ("simpo",), "simpo_gamma": ("simpo",), "tdpo_alpha": ("tdpo2",), "tgdpo_alpha": ("tgdpo",),
    "tis_low": ("tis_dpo",), "tis_high": ("tis_dpo",), "kto_desirable_weight": ("kto",),
    "kto_undesirable_weight": ("kto",), "completion_key": ("kto",), "label_key": ("kto",),
}  # fmt: skip
"""Setting of some objectives -> those objectives."""
