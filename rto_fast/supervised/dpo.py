"""DPO and its relatives: each objective's data, reference and stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rto_fast.algo import preference
from rto_fast.backend.frozen import FrozenModel
from rto_fast.backend.output_lock import alone
from rto_fast.config import DPOConfig
from rto_fast.data.chat_template import ChatTemplate, check_template
from rto_fast.data.load import load_answers, load_preferences
from rto_fast.data.tokenizer import check_max_length
from rto_fast.errors import require
from rto_fast.models.adapters import twin
from rto_fast.models.heads import PolicyModel
from rto_fast.models.load import check_weights, load_config, load_policy
from rto_fast.supervised.kto import KTO, Answers
from rto_fast.supervised.pair_objectives import (
    MPO,
    MPPO,
    TDPO,
    KLLoss,
    PairLoss,
    Pairs,
    Referenced,
    SimPO,
    TokenWeighted,
    TokenWeights,
    grouped_rows,
    pair_rows,
)
from rto_fast.supervised.prepare import Common, prepare, run_stage
from rto_fast.supervised.reference_cache import cached_reference_logps
from rto_fast.supervised.stage import Row, Stage


@dataclass(frozen=True)
class Objective:
    """One value of `--objective`: how its stage is made from the data, and its loss where several share a stage."""

    make: Callable[..., Stage]
    """Called with (config, common) and, where there is one, the loss."""
    loss: PairLoss | KLLoss | TokenWeights | None = None
    needs_reference: bool = True

    def stage(self, config: DPOConfig, common: Common) -> Stage:
        return self.make(config, common, *(() if self.loss is None else (self.loss,)))


@alone
def train_dpo(config: DPOConfig) -> Path:
    """DPO or another `objective` from preferences; returns the model's folder."""
    objective = OBJECTIVES[config.objective]
    require(
        objective.needs_reference or not config.reference,
        f"reference: {config.objective} has no reference; leave it out, or choose another --objective",
    )
    common = prepare(config)
    for name in ("reference", "guide_model", "guide_base"):
        _check_frozen(config, name, common.template)
    return run_stage(config, common, objective.stage(config, common))


def _check_frozen(config: DPOConfig, name: str, template: ChatTemplate) -> None:
    """ConfigError where the model that the setting `name` holds, if any, cannot read the rows."""
    if path := getattr(config, name):
        other = load_config(path, name)
        ours, theirs = (c.get_text_config().vocab_size for c in (load_config(config.model, "model"), other))
        require(theirs == ours, f"{name}: {path!r} has a vocabulary of {theirs} tokens, the model's has {ours}")
        check_weights(path, name)
        check_template(path, template, name)
        check_max_length(config.max_length, other, f"max_length ({name})")


def _load_model(config: DPOConfig, common: Common) -> PolicyModel:
    return load_policy(config.model, argument="model", **common.loading)


def _load_reference(config: DPOConfig, common: Common, **changed: Any) -> PolicyModel:
    source, argument = (config.reference, "reference") if config.reference else (config.model, "model")
    return load_policy(source, argument=argument, **common.loading | {"lora": None} | changed)


def _one_base(config: DPOConfig) -> bool:
    """Whether the reference stands on the weights under the adapter that is trained."""
    return config.lora_rank > 0 and not config.reference


def _model_and_tables(
    config: DPOConfig, common: Common, *parts: tuple[Sequence[int], Sequence[Row]]
) -> tuple[PolicyModel, tuple[Tensor, ...]]:
    """The model to train, and its reference's summed log-probs of the rows."""
    model = _load_model(config, common) if _one_base(config) else None
    reference = twin(model) if model else _load_reference(config, common)
    tables = cached_reference_logps(reference, parts, config, common.tokenizer, common.template, common.placement)
    del reference
    return model or _load_model(config, common), tables


def _model_and_reference(config: DPOConfig, common: Common) -> tuple[PolicyModel, FrozenModel]:
    """The model to train, and its reference, whole on this rank."""
    if _one_base(config) and config.zero_stage < 3:  # which takes the base apart
        model = _load_model(config, common)
        return model, _whole(twin(model), common)
    reference = _whole(_load_reference(config, common, home="device"), common)
    return _load_model(config, common), reference


def _referenced(config: DPOConfig, common: Common, loss: PairLoss) -> Referenced:
    parts = load_preferences(config, common.tokenizer, common.template)
    train, held_out = map(pair_rows, parts)
    model, tables = _model_and_tables(config, common, (parts[0].rows, train), (parts[1].rows, held_out))
    return Referenced(model, train, held_out, config, loss, (tables[0], tables[1]))


def _unreferenced(
    config: DPOConfig,
    common: Common,
    *,
    kind: type[SimPO | MPO | MPPO],
    rows: Callable[[Any], Sequence[Row]] = pair_rows,
) -> Stage:
    train, held_out = map(rows, load_preferences(config, common.tokenizer, common.template))
    return kind(_load_model(config, common), train, held_out, config)


def _tdpo(config: DPOConfig, common: Common, loss: KLLoss) -> TDPO:
    train, held_out = map(pair_rows, load_preferences(config, common.tokenizer, common.template))
    model, reference = _model_and_reference(config, common)
    return TDPO(model, train, held_out, config, loss, reference)


def _whole(model: PolicyModel, common: Common) -> FrozenModel:
    device = common.placement.device
    return FrozenModel(model.eval().requires_grad_(False).to(device), device, parks=False)


def _token_weighted(config: DPOConfig, common: Common, weights: TokenWeights) -> TokenWeighted:
    train, held_out = map(pair_rows, load_preferences(config, common.tokenizer, common.template))
    loading = common.loading | {"home": "device", "lora": None}
    model, reference = _model_and_reference(config, common)
    guide = _whole(load_policy(config.guide_model, argument="guide_model", **loading), common)
    base = reference
    if config.guide_base:
        base = _whole(load_policy(config.guide_base, argument="guide_base", **loading), common)
    return TokenWeighted(model, train, held_out, config, weights, reference, guide, base)


def _kto(config: DPOConfig, common: Common) -> KTO:
    parts = load_answers(config, common.tokenizer, common.template)
    learnt = Answers.of(parts[0], config.max_length)
    answers = (learnt, Answers.of(parts[1], config.max_length, spare=learnt.rows))
    rows = [rows for a in answers for rows in (a.rows, a.mismatched)]
    model, tables = _model_and_tables(config, common, *((range(len(r)), r) for r in rows))
    return KTO(model, answers, tables[::2], tables[1::2], config)


def _dpo_loss(pairs: Pairs, config: DPOConfig) -> Tensor:
    loss = preference.dpo_loss(
        *pairs.logp.unbind(1), *pairs.ref_logp.unbind(1), beta=config.beta, label_smoothing=config.label_smoothing
    )
    return (
        loss + config.nll_coef * preference.chosen_nll(pairs.logp[:, 0], pairs.lens[:, 0]) if config.nll_coef else loss
    )


OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(_referenced, _dpo_loss),
    "r_dpo": Objective(
        _referenced,
        lambda p, c: preference.r_dpo_loss(*p.ratios, *p.lens.unbind(1), beta=c.beta, alpha=c.r_dpo_alpha),
    ),
    "ipo": Objective(_referenced, lambda p, c: preference.ipo_loss(*p.ratios, *p.lens.unbind(1), beta=c.beta)),
    "tdpo1": Objective(_tdpo, lambda ratios, kls, c: preference.tdpo1_loss(*ratios, *kls, beta=c.beta)),
    "tdpo2": Objective(
        _tdpo, lambda ratios, kls, c: preference.tdpo2_loss(*ratios, *kls, beta=c.beta, alpha=c.tdpo_alpha)
    ),
    "tgdpo": Objective(
        _token_weighted, lambda g, sign, c: preference.tgdpo_weights(g, sign, beta=c.beta, alpha=c.tgdpo_alpha)
    ),
    "tis_dpo": Objective(
        _token_weighted, lambda g, sign, c: preference.tis_weights(g, sign, low=c.tis_low, high=c.tis_high)
    ),
    "kto": Objective(_kto),
    "simpo": Objective(partial(_unreferenced, kind=SimPO), needs_reference=False),
    "mpo": Objective(partial(_unreferenced, kind=MPO), needs_reference=False),
    "mppo": Objective(partial(_unreferenced, kind=MPPO, rows=grouped_rows), needs_reference=False),
}
"""All values of `--objective`; config/supervised.py names them as choices of the flag."""
