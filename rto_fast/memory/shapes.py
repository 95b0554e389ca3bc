"""Sizes of a model, read from its config; no weight is loaded."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from rto_fast.config import Lora
from rto_fast.data.adapter_folder import AdapterFolder, read_adapter
from rto_fast.errors import ConfigError
from rto_fast.models.adapters import HEAD, PREFIX, target_modules
from rto_fast.models.heads import backbone
from rto_fast.models.load import load_config
from rto_fast.models.one_base import classifier_over
from rto_fast.models.quantised import matrices as quantised_maps

_LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
KNOWN: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
       "tie_word_embeddings": True},
    "llama-3-8b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3-70b": _LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}  # fmt: skip
"""Configs that need no file and no network."""


@dataclass(frozen=True)
class ModelShape:
    """Counts of one model. A causal model's parameters include its head; a tied head counts once."""

    parameters: int
    largest: int
    """Elements of the largest parameter."""
    layers: int
    hidden: int
    intermediate: int
    """Features of one feed-forward block that a token passes through."""
    query: int
    """Features of all query heads."""
    keys: int
    """Features of all key heads (values have as many)."""
    vocab: int
    """Rows of the lm_head; 0 for a model with one output."""
    matrices: tuple[int, int, int]
    """Of the linear maps that `frozen_dtype` is for: their numbers, their rows, the numbers of the largest."""
    adapter: int = 0
    """Numbers of the LoRA adapter that it carries, beside its parameters; 0 = none, or a merged one."""
    largest_adapter: int = 0
    """Elements of the adapter's largest matrix."""
    adapted: int = 0
    """Elements of the largest matrix that the adapter changes."""
    on_base: bool = False
    """Its weights are the policy's base; so it may do without weights of its own."""

    @property
    def head(self) -> int:
        """Numbers of the head that gives one output, which is trained with the adapter."""
        return 0 if self.vocab else self.hidden

    @property
    def trained(self) -> int:
        """Numbers that an optimiser has, where the model is trained."""
        return self.adapter + self.head if self.adapter else self.parameters

    @property
    def largest_trained(self) -> int:
        return max(self.largest_adapter, self.head) if self.adapter else self.largest


def shape_of(path: str, argument: str, *, scalar: bool = False) -> ModelShape:
    """The shape of a folder, config file, Hub id or KNOWN name; ConfigError where there is no such model.

    scalar: as reward model or critic, with one output in place of the lm_head.
    """
    return shape_from(_config_of(path, argument), argument, scalar=scalar)


def names_a_size(path: str) -> bool:
    """Whether a path stands for the size of a model and not for one with weights."""
    return path in KNOWN or Path(path).is_file()


def adapted(shape: ModelShape, path: str, argument: str, lora: Lora | None, *, on_base: bool = False) -> ModelShape:
    """The shape with the adapter of its folder, or with a new one.

    lora: of a new one; None = a folder without an adapter has none. Raises ConfigError where a module of `lora` is
    none of the model's.
    """
    if folder := read_adapter(path, argument):
        sizes = _sizes_in(folder)
    else:
        sizes = sizes_of(_config_of(path, argument), lora, argument) if lora else (0, 0, 0)
    numbers, largest, changed = sizes
    return dataclasses.replace(shape, adapter=numbers, largest_adapter=largest, adapted=changed, on_base=on_base)


def sizes_of(config: PretrainedConfig, lora: Lora, argument: str) -> tuple[int, int, int]:
    """(numbers of an adapter, elements of its largest matrix, of the largest one that it changes).

    A matrix of m rows and n columns gets two, of rank r: r (m + n) numbers; DoRA m more.
    """
    lm = _without_storage(config.to_json_string(use_diff=False), type(config))
    head, ends = lm.get_output_embeddings(), tuple(f".{name}" for name in target_modules(lm, lora.targets, argument))
    changed = [m for name, m in lm.named_modules() if m is not head and f".{name}".endswith(ends)]
    shapes = [tuple(m.weight.shape)[:: -1 if isinstance(m, Conv1D) else 1] for m in changed]
    numbers = sum(lora.rank * (m + n) + (m if lora.dora else 0) for m, n in shapes)
    return numbers, lora.rank * max(max(shape) for shape in shapes), max(m * n for m, n in shapes)


def _sizes_in(folder: AdapterFolder) -> tuple[int, int, int]:
    """`sizes_of` the adapter in a folder, without the reward head beside it."""
    with safe_open(folder.weights, "pt") as tensors:
        found = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118  (no mapping)
    shapes = {name: shape for name, shape in found.items() if not name.removeprefix(PREFIX).startswith(f"{HEAD}.")}
    sizes = [math.prod(shape) for shape in shapes.values()]
    first = {name: shape for name, shape in shapes.items() if ".lora_A." in name}
    changed = [shapes[name.replace("lora_A", "lora_B")][0] * shape[1] for name, shape in first.items()]
    return sum(sizes), max(sizes), max(changed)


def reads_alike(path: str, argument: str) -> bool:
    """Whether a language model's backbone can stand under its family's reward model."""
    config = _config_of(path, argument)
    lm = _without_storage(config.to_json_string(use_diff=False), type(config))
    return classifier_over(backbone(lm), config) is not None


def _config_of(path: str, argument: str) -> PretrainedConfig:
    """The config of a folder, config file, Hub id or KNOWN name."""
    if path in KNOWN:
        settings = dict(KNOWN[path])
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    try:
        return load_config(path, argument)
    except ConfigError as error:
        raise ConfigError(f"{error}; without network pass a config.json, or one of {', '.join(KNOWN)}") from error


def shape_from(config: PretrainedConfig, argument: str, *, scalar: bool = False) -> ModelShape:
    """The shape of a model with this config, counted on a model without storage."""
    try:
        kind: Any = type(config)
        parameters, largest, head, tied, matrices = _count(config.to_json_string(use_diff=False), kind)
    except ValueError as error:
        raise ConfigError(f"{argument}: no causal language model has a {type(config).__name__}") from error
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if scalar:
        parameters += text.hidden_size - (0 if tied else head)
    return ModelShape(
        parameters=parameters, largest=largest, layers=text.num_hidden_layers, hidden=text.hidden_size,
        intermediate=_intermediate(text), query=text.num_attention_heads * width, keys=keys * width,
        vocab=0 if scalar else text.vocab_size, matrices=matrices,
    )  # fmt: skip


def _intermediate(text: PretrainedConfig) -> int:
    """Features of the feed-forward blocks that one token passes; a mixture's are those of its chosen experts."""
    dense = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    experts = getattr(text, "num_experts_per_tok", None)
    return int(experts * (getattr(text, "moe_intermediate_size", None) or dense)) if experts else int(dense)


@functools.lru_cache(maxsize=16)
def _count(text: str, kind: Any) -> tuple[int, int, int, bool, tuple[int, int, int]]:
    """(parameters, elements of the largest, elements of the lm_head, whether it is tied, `ModelShape.matrices`)."""
    lm = _without_storage(text, kind)
    head = lm.get_output_embeddings()
    tied = head is not None and head.weight is lm.get_input_embeddings().weight
    sizes = [p.numel() for p in lm.parameters()]
    held = [m.weight for m in quantised_maps(lm).values()]
    numbers = [w.numel() for w in held]
    of_maps = sum(numbers), sum(w.shape[0] for w in held), max(numbers, default=0)
    return sum(sizes), max(sizes), 0 if head is None else head.weight.numel(), tied, of_maps


def _without_storage(text: str, kind: Any) -> Any:
    """The language model of a config's JSON."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(kind.from_dict(json.loads(text)))
