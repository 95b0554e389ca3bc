"""A checksum of tensors that both ends of a transfer compute: integer sums, the same in any order and on any device.

    digest = sum_i mix(word_i + i * A) mod 2**64,    mix(x) = (x ^ (x >> 29)) * B

where word_i are the tensor's bytes as integers of its element size. Moving, changing or dropping a word moves it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_A, _B = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9
_CHUNK = 1 << 20
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fingerprint:
    """Digests of named tensors, kept on their device until `digests` is asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.bytes = 0
        """Bytes of all tensors added."""

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def __len__(self) -> int:
        return len(self._sums)

    @torch.no_grad()
    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a tensor of any shape; `name` must be new."""
        if name in self._sums:
            raise ValueError(f"{name}: added twice")
        words = tensor.detach().contiguous().reshape(-1).view(_WORDS[tensor.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=words.device)
        for start in range(0, words.numel(), _CHUNK):
            part = words[start : start + _CHUNK]
            place = torch.arange(start, start + part.numel(), device=part.device)
            x = part.to(torch.int64) + place * _A
            total += ((x ^ (x >> 29)) * _B).sum()
        self._sums[name] = total
        self.bytes += tensor.numel() * tensor.element_size()

    def digests(self) -> dict[str, int]:
        """{name: digest}; waits for the device once."""
        if not self._sums:
            return {}
        device = next(iter(self._sums.values())).device
        return dict(zip(self._sums, torch.stack([s.to(device) for s in self._sums.values()]).tolist(), strict=True))
