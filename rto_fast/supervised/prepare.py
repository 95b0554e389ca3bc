"""What every supervised stage does before its training: checks, tokenizer, log."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rto_fast import distributed
from rto_fast.backend.checkpoints import Checkpoints, check_space, open_output
from rto_fast.config import SupervisedConfig
from rto_fast.data.chat_template import ChatTemplate, check_template, load_template
from rto_fast.data.tokenizer import check_max_length, check_vocabulary, load_tokenizer
from rto_fast.logs.run_logger import RunLogger
from rto_fast.models.adapters import check_adapter
from rto_fast.models.load import check_weights, load_config, place
from rto_fast.models.packing import Placement
from rto_fast.models.quantised import check_code, numbers_of
from rto_fast.models.router import check_router, watch_router
from rto_fast.models.save import rehearse_export
from rto_fast.supervised.loop import fit, steps_of
from rto_fast.supervised.stage import Stage


@dataclasses.dataclass(frozen=True)
class Common:
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    placement: Placement
    loading: dict[str, Any]
    checkpoints: Checkpoints
    found: tuple[int, dict[str, Any]] | None
    """The checkpoint to go on from."""


def prepare(config: SupervisedConfig) -> Common:
    """Cheap checks, then tokenizer, template and device."""
    config.validate()
    check_code(config.lora_base_dtype, "lora_base_dtype")
    device = distributed.init()
    checkpoints = open_output(config)
    found = checkpoints.read()
    model = load_config(config.model, "model")
    check_adapter(config.model, config.lora, "model")
    tokenizer = load_tokenizer(config.model)
    template = load_template(config.chat_template, tokenizer, config.template_date)
    check_weights(config.model, "model")
    check_vocabulary(tokenizer, model, "model")
    check_template(config.model, template, "model")
    check_max_length(config.max_length, model, "max_length")
    check_router(model, config.router_aux_coef, "model")
    placement, loading = place(config, device, config.micro_tokens, config.max_length)
    loading["lora"] = config.lora
    return Common(tokenizer, template, placement, loading, checkpoints, found)


def run_stage(config: SupervisedConfig, common: Common, stage: Stage) -> Path:
    """Opens the log, which writes the first files, and trains."""
    common.checkpoints.check_inputs(config)
    watch_router(stage.model, config.router_aux_coef)
    rehearse_export([stage.model], common.tokenizer, common.template)
    tight = check_space(config, [stage.model])
    logger = RunLogger(
        config.output_dir, stage=stage.name, total_steps=steps_of(config, len(stage.train)), rank=distributed.rank(),
        wandb_project=config.wandb_project, config=dataclasses.asdict(config),
        start_step=common.found[0] if common.found else 0,
    )  # fmt: skip
    if said := _adapter_said(config, stage.model):
        logger.message(said)
    for warning in [*common.checkpoints.torn, *filter(None, [tight])]:
        logger.warn(warning)
    return fit(
        config, stage, common.tokenizer, common.template, common.placement, common.checkpoints, logger, common.found
    )


def _adapter_said(config: SupervisedConfig, model: Any) -> str:
    """What is trained where it is an adapter, for the log; else ""."""
    if not (adapter := model.adapter):
        return ""
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    held = f" in {config.lora_base_dtype}" if config.lora_base_dtype != "off" else ""
    return (
        f"adapter: {'a new one' if adapter.fresh else 'that of ' + config.model} of rank {config.lora_rank} on "
        f"{adapter.base}{held}, {trained:,} of {numbers_of(model):,} parameters, learning rate {config.peak_lr:g} "
        "(--lora-lr)"
    )
