"""The auxiliary loss of a mixture of experts.

It keeps the router from sending most tokens to few experts.

    E * sum_e f_e P_e        Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6

f_e: how often the tokens choose expert e; P_e: the mean probability that the router gives it. Each family's own
function in transformers computes it, here from the tokens of packed rows, of which none is padding.

f is no number of single tokens, so the loss of a batch is no sum over its micro-batches: as in other trainers, each
micro-batch of each rank has a loss of its own. They are weighted by their tokens. So the loss depends a little on
--micro-tokens and on the number of ranks; where one micro-batch holds the whole batch, it is transformers' own.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rto_fast.errors import ConfigError

NAME = "load_balancing_loss_func"
ARGUMENTS = ["gate_logits", "num_experts", "top_k"]
"""transformers' function, in the module of each family that has it, and its first arguments."""
EXPERTS, CHOSEN = ("num_local_experts", "num_experts", "moe_num_experts"), ("num_experts_per_tok", "moe_top_k")
"""Names by which families' configs know the number of experts, and of those that a token goes to."""
RouterLogits = tuple[Tensor, ...]
"""Of each layer with experts, [tokens, E]."""


class RouterLoss:
    """The auxiliary loss of the forwards that a model makes in training."""

    def __init__(self, model: Any) -> None:
        """model: transformers' own. Raises ConfigError where it has no such loss."""
        found = _function(type(model))
        text = model.config.get_text_config(decoder=True)
        sizes = [_first(names, text, getattr(text, "ffn_config", None)) for names in (EXPERTS, CHOSEN)]
        if found is None or not all(sizes):
            raise ConfigError(_refusal(type(model).__name__))
        self.function, (self.experts, self.chosen) = found, sizes
        self._last: Tensor | None = None

    def record(self, parts: Sequence[RouterLogits]) -> None:
        """Keeps the loss of one forward, which has come in parts (those of sequences that run alone)."""
        layers = tuple(torch.cat([x.flatten(0, -2) for x in layer]) for layer in zip(*parts, strict=True))
        self._last = self.function(layers, self.experts, self.chosen)

    def take(self) -> Tensor:
        """The loss of the last forward, a scalar with a gradient; once."""
        loss, self._last = self._last, None
        assert loss is not None, "no forward in training mode since the last one"
        return loss


def check_router(config: PretrainedConfig, coefficient: float, argument: str) -> None:
    """ConfigError where an auxiliary loss is asked of a model that has none; from its config alone."""
    if coefficient and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        if _function(kind) is None:
            raise ConfigError(f"{argument}: {_refusal(kind.__name__)}")


def watch_router(model: Any, coefficient: float) -> None:
    """Lets a PolicyModel or a ScalarModel compute the auxiliary loss in training; not where the coefficient is 0."""
    if coefficient:
        model.router = RouterLoss(model.inner)


def _first(names: Sequence[str], *configs: object) -> int:
    """The first setting of one of these names that is there, else 0."""
    found = (getattr(config, name, None) for config in configs for name in names)
    return next((value for value in found if value), 0)


def _function(kind: type) -> Callable[..., Tensor] | None:
    """The auxiliary loss of a family's class, or None."""
    function = getattr(sys.modules[kind.__module__], NAME, None)
    known = function is not None and list(inspect.signature(function).parameters)[: len(ARGUMENTS)] == ARGUMENTS
    return function if known else None


def _refusal(name: str) -> str:
    return f"router_aux_coef: transformers has no auxiliary loss for {name}; leave --router-aux-coef at 0"
