"""Models that rank 0 has loaded and the other ranks know by their shapes alone.

For ZeRO-3, which takes them apart (backend/spread.py): no rank but 0 ever holds a whole model in host memory.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from rto_fast import distributed
from rto_fast.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


def from_rank_zero(load: Callable[[], M]) -> M:
    """What `load` gives on rank 0; on the others the same model, its parameters without storage. Collective.

    Buffers, configs and everything else come along. Raises on all ranks what is raised on rank 0.
    """
    model: Any = None
    failure: Exception | None = None
    message: Any = None
    if distributed.rank() == 0:
        try:
            model = load()
            message = "model", _skeleton(model)
        except Exception as error:  # the other ranks wait for an answer, whatever the error
            failure = error
            message = ("refused" if isinstance(error, ConfigError) else "broken"), str(error) or type(error).__name__
    kind, content = distributed.broadcast_object(message)
    if failure is not None:
        raise failure
    if kind == "refused":
        raise ConfigError(content)
    if kind == "broken":
        raise RuntimeError(f"rank 0 could not load a model: {content}")
    return model if model is not None else _revived(content)


def _skeleton(model: nn.Module) -> bytes:
    """The model without its parameters' contents."""
    parameters = list(model.parameters())
    places = {id(p): i for i, p in enumerate(parameters)}

    class Writer(pickle.Pickler):
        def persistent_id(self, item: Any) -> tuple[int, torch.Size, torch.dtype, bool] | None:
            place = places.get(id(item))
            return None if place is None else (place, item.shape, item.dtype, item.requires_grad)

    target = io.BytesIO()
    Writer(target, protocol=pickle.HIGHEST_PROTOCOL).dump(model)
    return target.getvalue()


def _revived(skeleton: bytes) -> Any:
    """The model; its parameters have shape and dtype, and all of their elements are one zero in memory."""
    made: dict[int, nn.Parameter] = {}

    class Reader(pickle.Unpickler):
        def persistent_load(self, item: tuple[int, torch.Size, torch.dtype, bool]) -> nn.Parameter:
            place, shape, dtype, trained = item
            if place not in made:  # a tied parameter comes several times
                made[place] = nn.Parameter(torch.zeros((), dtype=dtype).expand(shape), requires_grad=trained)
            return made[place]

    model = Reader(io.BytesIO(skeleton)).load()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # transformers notes what a class can record when a model of it is made.
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                type(module)(module.config)
            break
    return model
