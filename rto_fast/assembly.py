"""What the set-up of every stage has in common: the output folder, attention, frozen models, exported folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rto_fast import distributed, models
from rto_fast.attention import resolve_attention
from rto_fast.config import RunConfig, check_wandb
from rto_fast.data.chat_template import ChatTemplate, save_template
from rto_fast.engine import DTYPES, Checkpoints, deepspeed_config
from rto_fast.errors import ConfigError, require


def open_output(config: RunConfig) -> Checkpoints:
    """The run's checkpoints; ConfigError where the folder holds a run that is not to be resumed. Writes nothing."""
    check_wandb(config.wandb_project)
    folder = Path(config.output_dir)
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    require(there.is_dir(), f"output_dir: {there} is a file")
    require(os.access(there, os.W_OK | os.X_OK), f"output_dir: no permission to write in {there}")
    if config.resume == "never" and folder.is_dir() and any(p.suffix != ".log" for p in folder.iterdir()):
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


class FrozenModel:
    """A model for scoring only. With `parks` it waits in host memory until `fetch`, and again after `park`."""

    def __init__(self, module: Callable[..., Any], device: torch.device, *, parks: bool) -> None:
        self.module, self.device, self.parks = module, device, parks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def fetch(self) -> None:
        if self.parks:
            self.module.to(self.device)

    def park(self) -> None:
        if self.parks:
            self.module.to("cpu")


def frozen(model: torch.nn.Module, config: RunConfig, *, parks: bool = False) -> FrozenModel:
    """A model for scoring only; partitioned over ranks under ZeRO-3, else whole on the device (or parked)."""
    model.eval().requires_grad_(False)
    device = distributed.device()
    if config.zero_stage == 3:
        import deepspeed

        settings = {k: v for k, v in deepspeed_config(config).items() if k != "gradient_clipping"}
        settings["zero_optimization"] = {"stage": 3}
        distributed.barrier()  # see TrainEngine
        engine = deepspeed.initialize(model=model, config=settings)[0]
        engine.eval()
        return FrozenModel(engine, device, parks=False)
    return FrozenModel(model if parks else model.to(device), device, parks=parks)


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
