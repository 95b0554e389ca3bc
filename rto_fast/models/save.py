"""Models to Hugging Face folders."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rto_fast.data.chat_template import ChatTemplate, save_template
from rto_fast.errors import ConfigError
from rto_fast.logs.files import folder_aside
from rto_fast.models.adapters import file_name, gathered, merged_parameters, save_adapter
from rto_fast.models.heads import PolicyModel, ScalarModel


def full_parameters(model: nn.Module, *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor) one at a time; collective under ZeRO-3, which gathers one parameter a step.

    A tensor is valid until the next one is asked for. Tied parameters come once. trained: those alone that training
    changes.
    """
    for name, parameter in getattr(model, "inner", model).named_parameters():
        if parameter.requires_grad or not trained:
            with gathered(parameter):
                yield name, parameter.data


def whole_weights(model: PolicyModel | ScalarModel) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, full tensor) as `full_parameters`, with an adapter merged into a copy of its weights."""
    return merged_parameters(model.inner) if model.adapter else full_parameters(model)


def adapter_weights(model: PolicyModel | ScalarModel) -> Iterator[tuple[str, Tensor]]:
    """(name in PEFT's files, full tensor) of a model's adapter, as `full_parameters`."""
    return ((file_name(name), tensor) for name, tensor in full_parameters(model, trained=True))


def export(model: PolicyModel | ScalarModel, folder: str | Path, *, write: bool) -> None:
    """Writes a Hugging Face folder; every rank must call it, only the one with `write` writes.

    The weights are those of the model's dtype. Reward models carry `mean` and `std` in their config. A model with an
    adapter writes that, in PEFT's format.
    """
    inner = model.inner
    state = {}
    for name, tensor in full_parameters(model, trained=model.adapter is not None):
        if write:
            state[name] = tensor.detach().to("cpu", copy=True)
    if not write:
        return
    if model.adapter:
        statistics = {"mean": model.mean, "std": model.std} if isinstance(model, ScalarModel) else {}
        save_adapter(model, state, Path(folder), statistics)
        if getattr(inner, "generation_config", None) is not None:
            inner.generation_config.save_pretrained(folder)
        return
    if isinstance(model, ScalarModel):
        inner.config.mean, inner.config.std = model.mean, model.std
    inner.save_pretrained(folder, state_dict=state)
    # transformers leaves the class name of the head's subclass out, but not its own attention's name.
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config.pop("attn_implementation", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
    tokenizer.save_pretrained(folder)
    save_template(folder, template)


def rehearse_export(models: Iterable[nn.Module], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
    """Writes what an export holds beside the weights to a folder that is thrown away.

    What cannot be written shall end a run before its first step and not behind its last. Raises ConfigError.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            for model in models:
                inner: Any = getattr(model, "inner", model)
                inner.config.save_pretrained(folder)
                if getattr(inner, "generation_config", None) is not None:
                    inner.generation_config.save_pretrained(folder)
            save_tokenizer(Path(folder), tokenizer, template)
        except Exception as e:  # transformers raises many unrelated types here
            reason = " ".join(str(e).split())
            raise ConfigError(f"the model that this run would write at its end cannot be written: {reason}") from e


def save_model(
    model: torch.nn.Module,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    writes: bool,
) -> None:
    """A Hugging Face folder that the next stage takes; collective. It appears when it is whole."""
    with folder_aside(folder) if writes else nullcontext(folder) as aside:
        export(model, aside, write=writes)
        if writes:
            save_tokenizer(aside, tokenizer, template)
