"""DPO and its relatives: each objective's data, reference and stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from rto_fast.backend.frozen import FrozenModel
from rto_fast.config import DPOConfig
from rto_fast.data.chat_template import check_template
from rto_fast.data.load import load_answers, load_preferences
from rto_fast.data.tokenizer import check_max_length
from rto_fast.errors import require
from rto_fast.models.heads import PolicyModel
from rto_fast.models.load import check_weights, load_config, load_policy
from rto_fast.supervised.kto import KTO, Answers
from rto_fast.supervised.pair_objectives import MPPO, TDPO, Referenced, SimPO, grouped_rows, pair_rows
from rto_fast.supervised.prepare import Common, prepare, run_stage
from rto_fast.supervised.reference_cache import cached_reference_logps
from rto_fast.supervised.stage import Row, Stage


def train_dpo(config: DPOConfig) -> Path:
    """DPO or another `objective` from preferences; returns the model's folder."""
    common = prepare(config)
    if config.reference:
        reference = load_config(config.reference, "reference")
        ours = load_config(config.model, "model").vocab_size
        require(reference.vocab_size == ours, f"reference: {config.reference!r} has a vocabulary of "
                f"{reference.vocab_size} tokens, the model's has {ours}")  # fmt: skip
        check_weights(config.reference, "reference")
        check_template(config.reference, common.template, "reference")
        check_max_length(config.max_length, reference, "max_length (reference)")
    return run_stage(config, common, OBJECTIVES[config.objective](config, common))


def _load_reference(config: DPOConfig, common: Common) -> PolicyModel:
    source, argument = (config.reference, "reference") if config.reference else (config.model, "model")
    return load_policy(source, argument=argument, **common.loading)


def _reference_tables(
    config: DPOConfig, common: Common, *parts: tuple[Sequence[int], Sequence[Row]]
) -> tuple[Tensor, ...]:
    reference = _load_reference(config, common)
    return cached_reference_logps(reference, parts, config, common.tokenizer, common.template, common.placement)


def _referenced(config: DPOConfig, common: Common) -> Referenced:
    parts = load_preferences(config, common.tokenizer, common.template)
    train, held_out = map(pair_rows, parts)
    tables = _reference_tables(config, common, (parts[0].rows, train), (parts[1].rows, held_out))
    model = load_policy(config.model, argument="model", **common.loading)
    return Referenced(model, train, held_out, config, tables)


def _simpo(config: DPOConfig, common: Common) -> SimPO:
    train, held_out = map(pair_rows, load_preferences(config, common.tokenizer, common.template))
    return SimPO(load_policy(config.model, argument="model", **common.loading), train, held_out, config)


def _mppo(config: DPOConfig, common: Common) -> MPPO:
    train, held_out = map(grouped_rows, load_preferences(config, common.tokenizer, common.template))
    return MPPO(load_policy(config.model, argument="model", **common.loading), train, held_out, config)


def _tdpo(config: DPOConfig, common: Common) -> TDPO:
    train, held_out = map(pair_rows, load_preferences(config, common.tokenizer, common.template))
    device = common.placement.device
    reference = _load_reference(config, common).eval().requires_grad_(False).to(device)
    whole = FrozenModel(reference, device, parks=False)
    return TDPO(load_policy(config.model, argument="model", **common.loading), train, held_out, config, whole)


def _kto(config: DPOConfig, common: Common) -> KTO:
    parts = load_answers(config, common.tokenizer, common.template)
    learnt = Answers.of(parts[0], config.max_length)
    answers = (learnt, Answers.of(parts[1], config.max_length, spare=learnt.rows))
    rows = [rows for a in answers for rows in (a.rows, a.mismatched)]
    tables = _reference_tables(config, common, *((range(len(r)), r) for r in rows))
    model = load_policy(config.model, argument="model", **common.loading)
    return KTO(model, answers, tables[::2], tables[1::2], config)


OBJECTIVES: dict[str, Callable[[DPOConfig, Common], Stage]] = {
    "dpo": _referenced, "r_dpo": _referenced, "ipo": _referenced, "simpo": _simpo, "tdpo1": _tdpo, "tdpo2": _tdpo,
    "kto": _kto, "mppo": _mppo,
}  # fmt: skip
"""What makes the stage of each `objective`."""
