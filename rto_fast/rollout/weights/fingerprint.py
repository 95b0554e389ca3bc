"""A checksum of tensors that both ends of a transfer compute.

Integer sums: the same in any order and on any device.

    digest = sum_i mix(word_i + i * GAMMA) mod 2**64

where word_i are the tensor's bytes as integers of its element size and mix is SplitMix64's (Steele, Lea, Flood 2014).
Moving, changing or dropping words moves it. The mix has to be a thorough one: small changes of two words, one up and
one down, must not cancel in the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # as int64
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1))
"""Shift and factor of each round of the mix."""
_CHUNK = 1 << 20
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _add_checksum(words: Tensor, total: Tensor) -> None:
    """Adds the checksum of words [n] to `total`; on GPUs fingerprint_kernel.py does the same."""
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK]
        x = torch.arange(start, start + part.numel(), device=part.device).mul_(_GAMMA).add_(part)
        for shift, factor in _ROUNDS:
            x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)  # >> repeats the sign
        total += x.sum()


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
        if words.device.type == "cuda":
            from rto_fast.rollout.weights.fingerprint_kernel import add_checksum

            with torch.cuda.device(words.device):
                add_checksum(words, total)
        else:
            _add_checksum(words, total)
        self._sums[name] = total
        self.bytes += tensor.numel() * tensor.element_size()

    def digests(self) -> dict[str, int]:
        """{name: digest}; waits for the device once."""
        if not self._sums:
            return {}
        device = next(iter(self._sums.values())).device
        return dict(zip(self._sums, torch.stack([s.to(device) for s in self._sums.values()]).tolist(), strict=True))
