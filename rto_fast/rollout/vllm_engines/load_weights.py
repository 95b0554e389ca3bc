"""Loads pushed weights into vLLM's model, and reports what its loaders took."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from rto_fast.errors import SyncError
from rto_fast.rollout.weights.fingerprint import Fingerprint


def receive(worker: Any, weights: Iterator[tuple[str, Tensor]], received: Fingerprint) -> None:
    """Loads a set of weights in place; `received` gets every tensor as vLLM's own loaders were handed it.

    Raises SyncError at a name that vLLM does not take exactly once, and at a parameter of vLLM's that is not filled.
    """
    model = worker.model_runner.get_model()
    plain = model.load_weights
    filled: dict[str, int] = {}
    plain_loaders: list[tuple[Tensor, Callable[..., Any]]] = []

    def load_weights(pairs: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> set[str]:
        # The engine has just laid out empty parameters; from here on each of their loaders reports.
        current: list[tuple[str, Tensor]] = []
        taken: list[Tensor] = []
        plain_loaders.extend(_loaders(model))
        wanted = _watch(model, taken, filled)

        def close_last() -> None:
            if current:
                name, tensor = current.pop()
                if len(taken) != 1 or taken[0].shape != tensor.shape:
                    raise SyncError(f"{name}: vLLM took it {len(taken)} times, once is right")
                received.add(name, taken.pop())

        def told() -> Iterator[tuple[str, Tensor]]:
            for pair in pairs:
                close_last()
                current.append(pair)
                yield pair
            close_last()

        loaded = plain(told(), *args, **kwargs)
        empty = sorted(n for n, size in wanted.items() if filled.get(n, 0) != size)
        if empty:
            raise SyncError(f"{empty[0]}: vLLM filled {filled.get(empty[0], 0)} of its {wanted[empty[0]]} numbers")
        return loaded

    model.load_weights = load_weights
    try:
        with torch.no_grad():
            worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights
        # vLLM lays the same parameters out at the next push: what still reported then would hold this push's tensors.
        for parameter, loader in plain_loaders:
            parameter.weight_loader = loader
    _repack_head(model)


def _loaders(model: nn.Module) -> list[tuple[Tensor, Callable[..., Any]]]:
    """(parameter, its loader) of all of the model's parameters that have one."""
    return [(p, p.weight_loader) for p in model.parameters() if hasattr(p, "weight_loader")]


def _watch(model: nn.Module, taken: list[Tensor], filled: dict[str, int]) -> dict[str, int]:
    """Makes every parameter's loader report what it loads; returns how many numbers each parameter wants.

    A parameter is this rank's part of the model's.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    wanted: dict[str, int] = {}
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    for path, module in model.named_modules():
        if tied and path == "lm_head":
            continue
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}"
            embeds = isinstance(module, VocabParallelEmbedding) and own == "weight"
            rows = module.num_org_embeddings_per_partition if embeds else 0  # the table itself is padded
            wanted[name] = rows * parameter.shape[1] if embeds else parameter.numel()
            parameter.weight_loader = _reporting(parameter.weight_loader, name, taken, filled)
    return wanted


def _reporting(
    loader: Callable[..., Any], name: str, taken: list[Tensor], filled: dict[str, int]
) -> Callable[..., Any]:
    """The loader; `taken` gets the whole tensor that it is handed, `filled` how many numbers of it this rank keeps."""
    from vllm.model_executor.model_loader.reload.meta import get_numel_loaded

    # vLLM's reload puts a loader of this name around the layer's own, which waits for the layer's last tensor.
    own = inspect.unwrap(loader, stop=lambda f: f.__name__ != "online_process_loader")
    signature = inspect.signature(own)

    @wraps(loader)  # vLLM knows its own loaders by their names
    def load(parameter: Tensor, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        kept, _ = get_numel_loaded(own, signature.bind(parameter, loaded_weight, *args, **kwargs))
        taken.append(loaded_weight)
        filled[name] = filled.get(name, 0) + kept
        return loader(parameter, loaded_weight, *args, **kwargs)

    return load


def _repack_head(model: nn.Module) -> None:
    """On a CPU a tied lm_head multiplies by a packed copy, which vLLM's reload leaves as it was."""
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)
