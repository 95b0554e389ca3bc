"""The names and shapes that a push must bring: whole weights, or an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rto_fast.errors import SyncError


class ExpectedWeights:
    """What an engine checks a push against. Of tied parameters the model's first name counts."""

    def __init__(self, model: PreTrainedModel) -> None:
        """model: a transformers causal LM, on any device, meta too."""
        every = dict(model.named_parameters(remove_duplicate=False))
        self.shapes = {name: parameter.shape for name, parameter in every.items()}
        self.once = dict(model.named_parameters())
        self.tied = {
            name: next(first for first, p in self.once.items() if p is parameter)
            for name, parameter in every.items()
            if name not in self.once
        }
        """Second and later names of tied parameters -> the first one."""
        self.text = model.config.get_text_config(decoder=True)
        """Config of the text model."""

    @classmethod
    def of(cls, model_path: str | Path) -> ExpectedWeights:
        """Of a model folder or Hub id, from its config alone."""
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
            return cls(AutoModelForCausalLM.from_config(config, trust_remote_code=False))

    def checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights as they come; SyncError at the first whose name or shape is not the model's."""
        seen: set[str] = set()
        for name, tensor in weights:
            if name not in self.shapes:
                raise SyncError(f"{name}: pushed, but the engine's model has no such parameter")
            if name in seen:
                raise SyncError(f"{name}: pushed twice")
            if tensor.shape != self.shapes[name]:
                shape = list(self.shapes[name])
                raise SyncError(f"{name}: pushed with shape {list(tensor.shape)}, the engine's model has {shape}")
            seen.add(name)
            yield name, tensor

    def checked_once(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """As `checked`, without the further names of tied parameters: they bring no bytes of their own."""
        return ((name, tensor) for name, tensor in self.checked(weights) if name not in self.tied)

    def require_all(self, received: Iterable[str]) -> None:
        """SyncError where a parameter is not among the names that the engine took; any of its tied names will do."""
        taken = {self.tied.get(name, name) for name in received}
        if lost := [name for name in self.once if name not in taken]:
            raise SyncError(f"{lost[0]}: never taken ({len(lost)} of {len(self.once)} parameters are missing)")


class ExpectedAdapter(ExpectedWeights):
    """What an engine checks the push of an adapter against."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.shapes = dict(shapes)
        self.once: dict[str, Any] = self.shapes
        self.tied = {}

    def checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """As for whole weights, and SyncError at the end where one is missing: an engine cannot take a part."""
        seen = []
        for name, tensor in super().checked(weights):
            seen.append(name)
            yield name, tensor
        self.require_all(seen)
