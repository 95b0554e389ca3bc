"""Frozen models whose linear maps are held in 8 or 4 bits, by bitsandbytes.

    int8    a row's largest |w| is its scale:      w = code / 127 * scale                 1 byte, 4 a row
    nf4     a scale for 64 numbers, 16 levels at quantiles of the normal distribution     0.5625 bytes
            (arXiv 2305.14314)

A matrix is decoded to the run's dtype before each product, which reads many tokens. Embeddings, heads, norms and
biases stay as they are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rto_fast.errors import ConfigError, require

BLOCK = 64
"""Numbers that share a scale in nf4."""


@dataclass(frozen=True)
class Code:
    """A way to hold a matrix in few bits."""

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Of a matrix [m, n]: (codes, scales fp32)."""
    decode: Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]
    """Of codes, scales, shape and dtype: the matrix."""
    bytes: Callable[[int, int], float]
    """Of so many numbers in so many rows."""
    needs: str = "bitsandbytes"
    """The package that it comes from."""


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import int8_vectorwise_quant

    codes, scales, _ = int8_vectorwise_quant(weight.to(torch.float16).contiguous())  # its CUDA kernel reads no other
    return codes * (scales != 0)[:, None], scales  # a row of zeros has no scale


def _from_int8(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(codes, scales).to(dtype)


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight.reshape(-1, BLOCK).contiguous(), blocksize=BLOCK, quant_type="nf4")
    return codes, state.absmax


def _from_nf4(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """By rows of one block: bitsandbytes 0.50 decodes rows that end within a block wrongly on CPUs with AVX-512."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    rows = torch.Size((shape.numel() // BLOCK, BLOCK))
    state = QuantState(absmax=scales, shape=rows, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
    return dequantize_4bit(codes, state).view(shape)


CODES = {
    "int8": Code(_to_int8, _from_int8, lambda numbers, rows: numbers + 4.0 * rows),
    "nf4": Code(_to_nf4, _from_nf4, lambda numbers, rows: numbers / 2 + 4.0 * numbers / BLOCK),
}
"""By the names of `frozen_dtype`."""


class QuantisedLinear(nn.Module):
    """A linear map for forwards without gradients. Codes and scales are buffers: they move and park with the model."""

    def __init__(self, linear: nn.Linear, code: Code) -> None:
        super().__init__()
        self.code, self.shape = code, linear.weight.shape
        codes, scales = code.encode(linear.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        codes: Any = self.codes
        scales: Any = self.scales
        return F.linear(hidden, self.code.decode(codes, scales, self.shape, hidden.dtype), self.bias)


def check_code(kind: str) -> None:
    """ConfigError where `frozen_dtype` asks for what is not installed."""
    if kind != "off" and importlib.util.find_spec(CODES[kind].needs) is None:
        raise ConfigError(
            f"frozen_dtype: {kind} needs {CODES[kind].needs}; pip install 'rto-fast[quant]', or use --frozen-dtype off"
        )


def matrices(inner: Any) -> dict[str, nn.Linear]:
    """The linear maps of a transformers model that are quantised, by name: all but heads."""
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    return {
        name: module
        for name, module in inner.named_modules()
        if type(module) is nn.Linear and module is not head and name != "score" and not module.weight.numel() % BLOCK
    }


def quantise(model: Any, kind: str, argument: str) -> Any:
    """The model (a PolicyModel or ScalarModel) itself, its matrices in codes; for scoring only.

    Raises ConfigError where it has none.
    """
    found = matrices(model.inner)
    require(
        bool(found),
        f"frozen_dtype: {argument} ({type(model.inner).__name__}) has no linear map that could be held in {kind}; use "
        "--frozen-dtype off",
    )
    for name, linear in found.items():
        parent, _, own = name.rpartition(".")
        setattr(model.inner.get_submodule(parent), own, QuantisedLinear(linear, CODES[kind]))
    return model
