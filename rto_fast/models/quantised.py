"""Linear maps that are not trained in 8 or 4 bits, by bitsandbytes.

Of models for scoring, and of the base under adapters.

    int8    a row's largest |w| is its scale:      w = code / 127 * scale                 1 byte, 4 a row
    nf4     a scale for 64 numbers, 16 levels at quantiles of the normal distribution     0.5625 bytes
            (arXiv 2305.14314)

A matrix is decoded to the run's dtype before each product, which reads many tokens, and again for the gradient of its
input. Embeddings, heads, norms and biases stay as they are.
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
    """A linear map that is not trained. Codes and scales are buffers: they move and park with the model, and a
    checkpoint has none of them.
    """

    def __init__(self, linear: nn.Linear, kind: str, device: torch.device | None = None) -> None:
        """device: where codes are made and kept; None = where the weight is."""
        super().__init__()
        self.kind, self.code, self.shape = kind, CODES[kind], linear.weight.shape
        self.outfeatures, self.infeatures = self.shape  # as PEFT calls those of a matrix in codes
        codes, scales = self.code.encode(linear.weight.detach().to(device or linear.weight.device))
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale_bytes", scales.view(torch.uint8), persistent=False)  # which no cast reaches
        self.bias = linear.bias

    @property
    def scales(self) -> Tensor:
        """fp32."""
        raw: Any = self.scale_bytes
        return raw.view(torch.float32)

    @property
    def qweight(self) -> Tensor:
        """PEFT looks here where to put an adapter."""
        codes: Any = self.codes
        return codes

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The matrix [m, n] that it computes with."""
        return self.code.decode(self.qweight, self.scales, self.shape, dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        return _Product.apply(hidden, self)


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b of a matrix in codes, and dx = dy W. No decoded matrix is kept between the two."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, linear: QuantisedLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(hidden, linear.decoded(hidden.dtype), linear.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.linear.decoded(grad.dtype), None


def check_code(kind: str, setting: str = "frozen_dtype") -> None:
    """ConfigError where a setting asks for what is not installed."""
    if kind != "off" and importlib.util.find_spec(CODES[kind].needs) is None:
        flag = f"--{setting.replace('_', '-')}"
        raise ConfigError(
            f"{setting}: {kind} needs {CODES[kind].needs}; pip install 'rto-fast[quant]', or use {flag} off"
        )


def coded(inner: nn.Module) -> dict[str, QuantisedLinear]:
    """The maps in codes of a transformers model, by the names that they have without adapters."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in inner.named_modules()
        if isinstance(module, QuantisedLinear)
    }


def numbers_of(model: nn.Module) -> int:
    """Numbers of all weights, those in codes and in ZeRO-3's parts among them."""
    plain = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    return plain + sum(module.shape.numel() for module in coded(model).values())


def matrices(inner: Any) -> dict[str, nn.Linear]:
    """The linear maps of a transformers model that are quantised, by name: all but heads."""
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    return {
        name: module
        for name, module in inner.named_modules()
        if type(module) is nn.Linear and module is not head and name != "score" and not module.weight.numel() % BLOCK
    }


def quantise(
    model: Any, kind: str, argument: str, setting: str = "frozen_dtype", device: torch.device | None = None
) -> Any:
    """The model (a PolicyModel or ScalarModel) itself, its matrices in codes, which are not trained.

    device: where it ends. A model in host memory comes there a matrix at a time, so that the device never holds it
    whole; None = where it is. Raises ConfigError, naming the setting, where it has no matrix.
    """
    found = matrices(model.inner)
    require(
        bool(found),
        f"{setting}: {argument} ({type(model.inner).__name__}) has no linear map that could be held in {kind}; use "
        f"--{setting.replace('_', '-')} off",
    )
    for name in list(found):
        parent, _, own = name.rpartition(".")
        setattr(model.inner.get_submodule(parent), own, QuantisedLinear(found.pop(name), kind, device))
    return model.to(device) if device else model
