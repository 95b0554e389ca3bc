"""Sizes of a model, read from its config; no weight is loaded."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from rto_fast.errors import ConfigError
from rto_fast.models.load import load_config

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


def shape_of(path: str, argument: str, *, scalar: bool = False) -> ModelShape:
    """The shape of a folder, config file, Hub id or KNOWN name; ConfigError where there is no such model.

    scalar: as reward model or critic, with one output in place of the lm_head.
    """
    if path in KNOWN:
        settings = dict(KNOWN[path])
        return shape_from(AutoConfig.for_model(settings.pop("model_type"), **settings), argument, scalar=scalar)
    try:
        return shape_from(load_config(path, argument), argument, scalar=scalar)
    except ConfigError as error:
        raise ConfigError(f"{error}; without network pass a config.json, or one of {', '.join(KNOWN)}") from error


def shape_from(config: PretrainedConfig, argument: str, *, scalar: bool = False) -> ModelShape:
    """The shape of a model with this config, counted on a model without storage."""
    try:
        kind: Any = type(config)
        parameters, largest, head, tied = _count(config.to_json_string(use_diff=False), kind)
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
        vocab=0 if scalar else text.vocab_size,
    )  # fmt: skip


def _intermediate(text: PretrainedConfig) -> int:
    """Features of the feed-forward blocks that one token passes; a mixture's are those of its chosen experts."""
    dense = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    experts = getattr(text, "num_experts_per_tok", None)
    return int(experts * (getattr(text, "moe_intermediate_size", None) or dense)) if experts else int(dense)


@functools.lru_cache(maxsize=16)
def _count(text: str, kind: Any) -> tuple[int, int, int, bool]:
    """(parameters, elements of the largest, elements of the lm_head, whether it is tied)."""
    import json

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(kind.from_dict(json.loads(text)))
    head = lm.get_output_embeddings()
    tied = head is not None and head.weight is lm.get_input_embeddings().weight
    sizes = [p.numel() for p in lm.parameters()]
    return sum(sizes), max(sizes), 0 if head is None else head.weight.numel(), tied
