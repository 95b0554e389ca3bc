"""The stages before RTO: supervised fine-tuning, the reward model, DPO and its relatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rto_fast import distributed, models
from rto_fast.algo import preference
from rto_fast.assembly import FrozenModel, choose_attention, open_output
from rto_fast.config import DPOConfig, RMConfig, SFTConfig, SupervisedConfig
from rto_fast.data.chat_template import ChatTemplate, check_template, load_template
from rto_fast.data.load import load_answers, load_preferences, load_sft
from rto_fast.data.tokenizer import check_max_length, check_vocabulary, load_tokenizer
from rto_fast.engine import DTYPES, Checkpoints
from rto_fast.errors import require
from rto_fast.metrics import RunLogger
from rto_fast.models import PolicyModel
from rto_fast.packing import Placement
from rto_fast.preference_stages import (
    KTO,
    MPPO,
    TDPO,
    Answers,
    Referenced,
    SimPO,
    grouped_rows,
    pair_rows,
)
from rto_fast.reference_cache import cached_reference_logps
from rto_fast.supervised import Row, RowBatch, Rows, Stage, Sums, fit, held_out_batches, steps_of


class SFT(Stage):
    """Mean negative log-prob of response tokens."""

    name = "SFT"

    def __init__(self, model: nn.Module, train: Sequence[Row], held_out: Sequence[Row]) -> None:
        self.model, self.train, self.held_out = model, train, held_out

    def loss(self, model: object, batch: RowBatch) -> tuple[Tensor, Sums]:
        return -model(batch.packed).sum(), {}

    def count(self, rows: Sequence[Row]) -> float:
        return float(sum(len(r) for row in rows for r in row.responses))


class RewardModel(Stage):
    """Bradley-Terry on the scores at the last tokens; leaves the scores' mean and std in the model."""

    name = "reward model"

    def __init__(self, model: nn.Module, train: Sequence[Row], held_out: Sequence[Row]) -> None:
        self.model, self.train, self.held_out = model, train, held_out

    def loss(self, model: object, batch: RowBatch) -> tuple[Tensor, Sums]:
        chosen, rejected = batch.by_row(model(batch.packed, batch.packed.last_positions)).unbind(1)
        loss = preference.bradley_terry_loss(chosen, rejected)
        return loss.sum(), {"accuracy": (chosen > rejected).float().sum(), "margin": (chosen - rejected).sum()}

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
    models.check_weights(config.model, "model")
    check_vocabulary(tokenizer, model, "model")
    check_template(config.model, template, "model")
    check_max_length(config.max_length, model, "max_length")
    attention, kernel = choose_attention(config, device)
    placement = Placement(device, kernel, lockstep=config.zero_stage == 3, micro_tokens=config.micro_tokens)
    loading = {"dtype": DTYPES[config.dtype], "attention": attention}
    return _Common(tokenizer, template, placement, loading, checkpoints, found)


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
    parts = load_sft(config, common.tokenizer, common.template)
    train, held_out = (Rows(part.prompt_ids, part.response_ids) for part in parts)
    model = models.load_policy(config.model, argument="model", **common.loading)
    return _run(config, common, SFT(model, train, held_out))


def train_rm(config: RMConfig) -> Path:
    """Reward model from preference pairs; returns the model's folder."""
    common = _prepare(config)
    parts = load_preferences(config, common.tokenizer, common.template)
    train, held_out = map(pair_rows, parts)
    if not held_out and distributed.rank() == 0:
        print("warning: no pair is held out: the scores are not measured, their mean and std stay 0 and 1", flush=True)

    torch.manual_seed(config.seed)
    hidden = models.load_config(config.model, "model").hidden_size
    model = models.new_scalar(config.model, argument="model", head_std=1 / (hidden + 1), **common.loading)
    return _run(config, common, RewardModel(model, train, held_out))


def train_dpo(config: DPOConfig) -> Path:
    """DPO or another `objective` from preferences; returns the model's folder."""
    common = _prepare(config)
    if config.reference:
        reference = models.load_config(config.reference, "reference")
        ours = models.load_config(config.model, "model").vocab_size
        require(reference.vocab_size == ours, f"reference: {config.reference!r} has a vocabulary of "
                f"{reference.vocab_size} tokens, the model's has {ours}")  # fmt: skip
        models.check_weights(config.reference, "reference")
        check_template(config.reference, common.template, "reference")
        check_max_length(config.max_length, reference, "max_length (reference)")
    return _run(config, common, OBJECTIVES[config.objective](config, common))


def _load_reference(config: DPOConfig, common: _Common) -> PolicyModel:
    source, argument = (config.reference, "reference") if config.reference else (config.model, "model")
    return models.load_policy(source, argument=argument, **common.loading)


def _reference_tables(
    config: DPOConfig, common: _Common, *parts: tuple[Sequence[int], Sequence[Row]]
) -> tuple[Tensor, ...]:
    reference = _load_reference(config, common)
    return cached_reference_logps(reference, parts, config, common.tokenizer, common.template, common.placement)


def _referenced(config: DPOConfig, common: _Common) -> Referenced:
    parts = load_preferences(config, common.tokenizer, common.template)
    train, held_out = map(pair_rows, parts)
    tables = _reference_tables(config, common, (parts[0].rows, train), (parts[1].rows, held_out))
    model = models.load_policy(config.model, argument="model", **common.loading)
    return Referenced(model, train, held_out, config, tables)


def _simpo(config: DPOConfig, common: _Common) -> SimPO:
    train, held_out = map(pair_rows, load_preferences(config, common.tokenizer, common.template))
    return SimPO(models.load_policy(config.model, argument="model", **common.loading), train, held_out, config)


def _mppo(config: DPOConfig, common: _Common) -> MPPO:
    train, held_out = map(grouped_rows, load_preferences(config, common.tokenizer, common.template))
    return MPPO(models.load_policy(config.model, argument="model", **common.loading), train, held_out, config)


def _tdpo(config: DPOConfig, common: _Common) -> TDPO:
    train, held_out = map(pair_rows, load_preferences(config, common.tokenizer, common.template))
    device = common.placement.device
    reference = _load_reference(config, common).eval().requires_grad_(False).to(device)
    whole = FrozenModel(reference, device, parks=False)
    return TDPO(models.load_policy(config.model, argument="model", **common.loading), train, held_out, config, whole)


def _kto(config: DPOConfig, common: _Common) -> KTO:
    parts = load_answers(config, common.tokenizer, common.template)
    learnt = Answers.of(parts[0], config.max_length)
    answers = (learnt, Answers.of(parts[1], config.max_length, spare=learnt.rows))
    rows = [rows for a in answers for rows in (a.rows, a.mismatched)]
    tables = _reference_tables(config, common, *((range(len(r)), r) for r in rows))
    model = models.load_policy(config.model, argument="model", **common.loading)
    return KTO(model, answers, tables[::2], tables[1::2], config)


OBJECTIVES: dict[str, Callable[[DPOConfig, _Common], Stage]] = {
    "dpo": _referenced, "r_dpo": _referenced, "ipo": _referenced, "simpo": _simpo, "tdpo1": _tdpo, "tdpo2": _tdpo,
    "kto": _kto, "mppo": _mppo,
}  # fmt: skip
"""What makes the stage of each `objective`."""
