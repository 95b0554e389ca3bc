"""Gives a pushed adapter to vLLM's own LoRA, and reports what its layers took.

vLLM from 0.26 on reads an adapter from a folder alone, so it lies in a private one for the time of a push. Its layers
take A as it is and B times the adapter's scale.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rto_fast.data.adapter_folder import ADAPTER, ADAPTER_WEIGHTS
from rto_fast.errors import SyncError
from rto_fast.rollout.weights.fingerprint import Fingerprint

NAME = "rto-policy"
"""The adapter's name in vLLM."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM's layers can be made for; an adapter of a lower one leaves a part of them zero."""
Found = tuple[torch.Size, int]
"""Shape and digest of a tensor."""


def layer_rank(rank: int) -> int:
    """The least of vLLM's ranks that holds an adapter's; 0 = none does."""
    return next((one for one in RANKS if one >= rank), 0)


class Delivery:
    """An adapter on its way into a worker's layers, from a folder that only this account reads."""

    def __init__(self, worker: Any, weights: Iterable[tuple[str, Tensor]], settings: dict[str, Any], scale: float):
        """weights: by the names of PEFT's files; settings: of adapter_config.json; scale: of its product."""
        self.sent = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights}
        self.scale, self.device = scale, worker.device
        self.layers = [m for m in worker.model_runner.get_model().modules() if hasattr(m, "set_lora")]
        self.taken: Counter[Found] = Counter()
        self.folder = tempfile.TemporaryDirectory(prefix="rto-adapter-")
        (Path(self.folder.name) / ADAPTER).write_text(json.dumps(settings))
        save_file(self.sent, Path(self.folder.name) / ADAPTER_WEIGHTS)
        for layer in self.layers:
            layer.set_lora = self._reporting(layer.set_lora)

    def _reporting(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def set_lora(index: int, lora_a: Any, lora_b: Any, *args: Any, **kwargs: Any) -> Any:
            for one in (lora_a, lora_b):
                parts = one if isinstance(one, list | tuple) else [one]  # of matrices that vLLM keeps as one
                self.taken.update(self._found(part) for part in parts if isinstance(part, Tensor))
            return plain(index, lora_a, lora_b, *args, **kwargs)

        return set_lora

    def close(self) -> None:
        """Leaves layers and disk as they were before."""
        for layer in self.layers:
            layer.__dict__.pop("set_lora", None)
        self.layers = []
        self.folder.cleanup()

    def check(self, received: Fingerprint) -> None:
        """Adds every tensor that one of vLLM's layers took to `received`; SyncError at the first that none has."""
        for name, tensor in self.sent.items():
            wanted = self._found(tensor if ".lora_A." in name or self.scale == 1 else tensor * self.scale)
            if not self.taken[wanted]:
                raise SyncError(f"{name}: no layer of vLLM's took it; use --lora-push merged")
            self.taken[wanted] -= 1
            received.add(name, tensor.to(self.device))

    def _found(self, tensor: Tensor) -> Found:
        digest = Fingerprint()
        digest.add("", tensor.to(self.device))
        return tensor.shape, digest.digests()[""]


def receive_adapter(
    worker: Any, weights: Iterable[tuple[str, Tensor]], settings: dict[str, Any], scale: float, received: Fingerprint
) -> None:
    """Puts an adapter in the place of the last one in this process's worker; `received` as `Delivery.check`.

    Raises SyncError as that, ValueError where vLLM refuses the adapter.
    """
    delivery = Delivery(worker, weights, settings, scale)
    try:
        worker.add_lora(request(delivery.folder.name, load_inplace=True))
        delivery.check(received)
    finally:
        delivery.close()


def request(path: str = NAME, **how: bool) -> Any:
    """What vLLM is asked to sample with the adapter by; path: where it lies while it is loaded."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(NAME, 1, path, **how)
