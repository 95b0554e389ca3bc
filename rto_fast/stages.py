"""The stages before RTO: supervised fine-tuning, the reward model and DPO."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rto_fast import data, distributed, models, preference
from rto_fast.assembly import choose_attention, frozen, open_output
from rto_fast.config import DPOConfig, RMConfig, SFTConfig, SupervisedConfig, require
from rto_fast.engine import DTYPES, Checkpoints
from rto_fast.metrics import RunLogger
from rto_fast.packing import Placement
from rto_fast.supervised import Row, RowBatch, Stage, Sums, fit, held_out_batches, steps_of
from rto_fast.template import (
    ChatTemplate,
    check_max_length,
    check_template,
    check_vocabulary,
    load_template,
    load_tokenizer,
)


class SFT:
    """Mean negative log-prob of response tokens."""

    name = "SFT"

    def __init__(self, model: nn.Module, train: Sequence[Row], held_out: Sequence[Row]) -> None:
        self.model, self.train, self.held_out = model, train, held_out

    def loss(self, model: object, batch: RowBatch) -> tuple[Tensor, Sums]:
        logp, _ = model(batch.packed)
        return -logp[0].sum(), {}

    def count(self, rows: Sequence[Row]) -> float:
        return float(sum(len(r) for row in rows for r in row.responses))

    def finish(self, model: object, placement: Placement) -> dict[str, float]:
        return {}


class RewardModel:
    """Bradley-Terry on the scores at the last tokens; leaves the scores' mean and std in the model."""

    name = "reward model"

    def __init__(self, model: nn.Module, train: Sequence[Row], held_out: Sequence[Row]) -> None:
        self.model, self.train, self.held_out = model, train, held_out

    def loss(self, model: object, batch: RowBatch) -> tuple[Tensor, Sums]:
        chosen, rejected = batch.by_row(model(batch.packed, batch.packed.last_positions)).unbind(1)
        loss = preference.bradley_terry_loss(chosen, rejected)
        return loss.sum(), {"accuracy": (chosen > rejected).float().sum(), "margin": (chosen - rejected).sum()}

    def count(self, rows: Sequence[Row]) -> float:
        return float(len(rows))

    @torch.no_grad()
    def finish(self, model: object, placement: Placement) -> dict[str, float]:
        """Mean and std of all held-out scores, so that a user of the model can normalise its output."""
        if not self.held_out:
            return {}
        moments = torch.zeros(3, dtype=torch.float64)
        for batch in held_out_batches(self.held_out, placement):
            scores = model(batch.packed, batch.packed.last_positions).double().cpu()
            if batch.index:
                moments += torch.stack([torch.tensor(float(scores.numel())), scores.sum(), scores.square().sum()])
        count, total, square = distributed.sum_over_ranks(moments).tolist()
        mean = total / count
        std = max(square / count - mean**2, 1e-12) ** 0.5
        self.model.mean, self.model.std = mean, std
        return {"eval/score_mean": mean, "eval/score_std": std}


class DPO:
    """Direct preference optimisation against reference log-probs that were computed once, before training."""

    name = "DPO"

    def __init__(
        self,
        model: nn.Module,
        train: Sequence[Row],
        held_out: Sequence[Row],
        reference: tuple[Tensor, Tensor],
        beta: float,
    ) -> None:
        """reference: summed log-probs of the training and the held-out rows, [rows, 2] fp32 each."""
        self.model, self.train, self.held_out = model, train, held_out
        self.reference, self.beta = reference, beta

    def loss(self, model: object, batch: RowBatch) -> tuple[Tensor, Sums]:
        logp, _ = model(batch.packed)
        chosen, rejected = batch.sequence_sums(logp[0]).unbind(1)
        table = self.reference[1 if batch.held_out else 0]
        index = batch.index or [0] * len(batch.rows)  # a dummy's loss is weighted with zero
        ref_chosen, ref_rejected = table[index].to(chosen.device).unbind(1)
        loss = preference.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=self.beta)
        reward_chosen, reward_rejected = self.beta * (chosen - ref_chosen), self.beta * (rejected - ref_rejected)
        margin = reward_chosen - reward_rejected
        metrics = {
            "accuracy": (margin > 0).float().sum(),
            "margin": margin.sum(),
            "reward_chosen": reward_chosen.sum(),
            "reward_rejected": reward_rejected.sum(),
        }
        return loss.sum(), metrics

    def count(self, rows: Sequence[Row]) -> float:
        return float(len(rows))

    def finish(self, model: object, placement: Placement) -> dict[str, float]:
        return {}


@torch.no_grad()
def reference_logps(model: nn.Module, rows: Sequence[Row], placement: Placement) -> Tensor:
    """Summed log-prob of each row's responses, [rows, responses a row] fp32 on the CPU, the same on every rank."""
    mine: dict[int, Tensor] = {}
    for batch in held_out_batches(rows, placement, held_out=False) if rows else ():
        logp, _ = model(batch.packed)
        sums = batch.sequence_sums(logp[0]).float().cpu()
        mine |= dict(zip(batch.index, sums.unbind(0), strict=False))
    merged = {i: t for part in distributed.gather_objects(mine) for i, t in part.items()}
    return torch.stack([merged[i] for i in range(len(rows))]) if rows else torch.zeros(0, 2)


@dataclasses.dataclass(frozen=True)
class _Common:
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    placement: Placement
    loading: dict
    checkpoints: Checkpoints
    found: tuple[int, dict[str, Any]] | None
    """The checkpoint to go on from."""


def _prepare(config: SupervisedConfig) -> _Common:
    """Cheap checks, then tokenizer, template and device."""
    config.validate()
    device = distributed.init()
    checkpoints = open_output(config)
    found = checkpoints.read()
    model = models.load_config(config.model, "model")
    tokenizer = load_tokenizer(config.model)
    template = load_template(config.chat_template, tokenizer)
    check_vocabulary(tokenizer, model, "model")
    check_template(config.model, template, "model")
    check_max_length(config.max_length, model, "max_length")
    attention, kernel = choose_attention(config, device)
    placement = Placement(device, kernel, lockstep=config.zero_stage == 3, micro_tokens=config.micro_tokens)
    loading = {"dtype": DTYPES[config.dtype], "attention": attention}
    return _Common(tokenizer, template, placement, loading, checkpoints, found)


def _pairs(part: data.PreferenceData) -> list[Row]:
    return [
        Row(list(p), (list(c), list(r)))
        for p, c, r in zip(part.prompt_ids, part.chosen_ids, part.rejected_ids, strict=True)
    ]


def _run(config: SupervisedConfig, common: _Common, stage: Stage) -> Path:
    """Opens the log, which writes the first files, and trains."""
    logger = RunLogger(
        config.output_dir, stage=stage.name, total_steps=steps_of(config, len(stage.train)), rank=distributed.rank(),
        wandb_project=config.wandb_project, config=dataclasses.asdict(config),
        start_step=common.found[0] if common.found else 0,
    )  # fmt: skip
    return fit(
        config, stage, common.tokenizer, common.template, common.placement, common.checkpoints, logger, common.found
    )


def train_sft(config: SFTConfig) -> Path:
    """Supervised fine-tuning; returns the model's folder. Raises ConfigError on input that cannot work."""
    common = _prepare(config)
    parts = data.load_sft(config, common.tokenizer, common.template)
    train, held_out = (
        [Row(list(p), (list(r),)) for p, r in zip(part.prompt_ids, part.response_ids, strict=True)] for part in parts
    )
    model = models.load_policy(config.model, argument="model", **common.loading)
    return _run(config, common, SFT(model, train, held_out))


def train_rm(config: RMConfig) -> Path:
    """Reward model from preference pairs; returns the model's folder."""
    common = _prepare(config)
    parts = data.load_preferences(config, common.tokenizer, common.template)
    train, held_out = map(_pairs, parts)

    torch.manual_seed(config.seed)
    hidden = models.load_config(config.model, "model").hidden_size
    model = models.new_scalar(config.model, argument="model", head_std=1 / (hidden + 1), **common.loading)
    return _run(config, common, RewardModel(model, train, held_out))


def train_dpo(config: DPOConfig) -> Path:
    """DPO from preference pairs; returns the model's folder."""
    common = _prepare(config)
    if config.reference:
        reference = models.load_config(config.reference, "reference")
        ours = models.load_config(config.model, "model").vocab_size
        require(reference.vocab_size == ours, f"reference: {config.reference!r} has a vocabulary of "
                f"{reference.vocab_size} tokens, the model's has {ours}")  # fmt: skip
        check_template(config.reference, common.template, "reference")
        check_max_length(config.max_length, reference, "max_length (reference)")
    parts = data.load_preferences(config, common.tokenizer, common.template)
    train, held_out = map(_pairs, parts)

    source, argument = (config.reference, "reference") if config.reference else (config.model, "model")
    reference = frozen(models.load_policy(source, argument=argument, **common.loading), config)
    tables = tuple(reference_logps(reference, rows, common.placement) for rows in (train, held_out))
    del reference
    model = models.load_policy(config.model, argument="model", **common.loading)
    return _run(config, common, DPO(model, train, held_out, tables, config.beta))
