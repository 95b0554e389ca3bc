"""What the set-up of every stage has in common: the output folder, attention, frozen models, exported folders."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rto_fast import distributed, models
from rto_fast.attention import resolve_attention
from rto_fast.config import ConfigError, RunConfig, require
from rto_fast.engine import DTYPES, Checkpoints, deepspeed_config
from rto_fast.template import ChatTemplate, save_template


def open_output(config: RunConfig) -> Checkpoints:
    """The run's checkpoints; ConfigError where the folder holds a run that is not to be resumed."""
    folder = Path(config.output_dir)
    require(not folder.is_file(), f"output_dir: {folder} is a file")
    if config.resume == "never" and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"output_dir: {folder} already holds a run; pass --resume auto to go on with it, or another "
                          "--output-dir")  # fmt: skip
    distributed.barrier()
    return Checkpoints(config)


def choose_attention(config: RunConfig, device: torch.device) -> tuple[str, str]:
    """(transformers attention, packed kernel) for the run."""
    try:
        return resolve_attention(config.attention, device, DTYPES[config.dtype])
    except ValueError as error:
        raise ConfigError(str(error)) from error


def frozen(model: torch.nn.Module, config: RunConfig) -> torch.nn.Module:
    """A model for scoring only; partitioned over ranks under ZeRO-3, else whole on the device."""
    model.eval().requires_grad_(False)
    if config.zero_stage == 3:
        import deepspeed

        settings = {k: v for k, v in deepspeed_config(config).items() if k != "gradient_clipping"}
        settings["zero_optimization"] = {"stage": 3}
        engine = deepspeed.initialize(model=model, config=settings)[0]
        engine.eval()
        return engine
    return model.to(distributed.device())


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
    tokenizer.save_pretrained(folder)
    save_template(folder, template)


def save_model(
    model: torch.nn.Module,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    writes: bool,
) -> None:
    """A Hugging Face folder that the next stage takes; collective."""
    models.export(model, folder, write=writes)
    if writes:
        save_tokenizer(folder, tokenizer, template)
