"""TRL (1.16): the fused LM head of its SFT, DPO, KTO, GRPO and RLOO trainers, and the selective log-softmax, on our
kernels.

from rto_kernels.integrations import trl
trl.patch()
GRPOTrainer(...).train()
"""

from typing import Any

import torch

from ..linear_logprob import token_logprobs
from ..logits_logprob import logprobs_from_logits
from ._swap import Swaps, once, partitioned, supported

FALLS_THROUGH = (
    "DistillationTrainer: the divergence between two heads, which is another function of TRL's",
    "fused LM head: a logit scale that is not positive",
    "selective_log_softmax: several targets a position (top-k)",
    "any: fp64 tensors, nested tensors, DTensors",
)

_swaps = Swaps("trl")


# What TRL's own function computes where it is not told.
ALL_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def _fused_head(original: Any) -> Any:
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    class FusedHead:
        """Stands in for TRL's ChunkedLogProbFunction, of which only `apply` is called."""

        @staticmethod
        def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap=None, scale=1.0, outputs=ALL_OUTPUTS):
            # TRL holds a ZeRO-3 head whole around this call, and gathers it again around its backward pass.
            gather = maybe_gather_lm_head_ctx if partitioned(weight) else None
            if not scale > 0 or not supported(hidden, weight, bias, zero3=True):
                return original.apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs)
            device = hidden.device.type
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
                bias = None if bias is None else bias.to(dtype)
                hidden, weight = hidden.to(dtype), weight.to(dtype)
            elif hidden.dtype != weight.dtype:
                weight = weight.to(hidden.dtype)
            if bias is not None:
                bias = bias.to(weight.dtype)
            # softcap·tanh(scale·z/softcap)/T = (softcap/scale)·tanh(z/(softcap/scale)) / (T/scale)
            extras = [name for name in ALL_OUTPUTS[2:] if name in outputs]
            entropy = "entropy" in outputs
            out = token_logprobs(
                hidden,
                weight,
                targets,
                bias=bias,
                temperature=temperature / scale,
                softcap=None if softcap is None else softcap / scale,
                return_entropy=entropy,
                extras=extras,
                gather=gather,
            )
            out = out if entropy or extras else (out,)
            given = dict(zip(["log_probs", *["entropy"] * entropy, *extras], out, strict=True))
            return tuple(given.get(name) for name in ALL_OUTPUTS)

    return FusedHead


def _takes(logits, index, row_mask) -> bool:
    return supported(logits) and logits.ndim >= 1 and index.shape == logits.shape[:-1] and logits.shape[-1] > 0


def _masked(index, row_mask):
    """Targets with skipped rows at our ignore_index, where log-prob and entropy are 0."""
    return index if row_mask is None else index.masked_fill(row_mask == 0, -100)


def _selective_log_softmax(original: Any) -> Any:
    def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
        if not _takes(logits, index, row_mask):
            return original(logits, index, temperature, row_mask)
        return logprobs_from_logits(logits, _masked(index, row_mask), temperature=temperature)

    return selective_log_softmax


def _selective_log_softmax_and_entropy(original: Any) -> Any:
    def selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
        if not _takes(logits, index, row_mask):
            return original(logits, index, entropy_requires_grad, temperature, row_mask)
        logp, entropy = logprobs_from_logits(
            logits, _masked(index, row_mask), temperature=temperature, return_entropy=True
        )
        return logp, entropy if entropy_requires_grad else entropy.detach()

    return selective_log_softmax_and_entropy


def _patch() -> None:
    from trl.trainer import utils

    _swaps.attribute(utils, "_ChunkedLogProbFunction", _fused_head(utils._ChunkedLogProbFunction))
    _swaps.function(utils.selective_log_softmax, _selective_log_softmax(utils.selective_log_softmax))
    _swaps.function(
        utils.selective_log_softmax_and_entropy,
        _selective_log_softmax_and_entropy(utils.selective_log_softmax_and_entropy),
    )


def patch() -> None:
    """Let TRL's trainers use our log-probs, also those already built. Raises ImportError without TRL."""
    once(_patch, _swaps)


def unpatch() -> None:
    """Put TRL's own functions back."""
    _swaps.undo()
