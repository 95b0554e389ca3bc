"""Log-probabilities of chosen tokens straight from hidden states; the [N, V] logits are never held.

    z_iv    = softcap · tanh((hidden_i · weight_v + bias_v) / softcap) / temperature
    logp_i  = z_i,target − lse_i,         lse_i = log Σ_v exp(z_iv)
    H_i     = −Σ_v p_iv · log p_iv,       p_iv  = exp(z_iv − lse_i)
    dz_iv   = g_i·(onehot_iv − p_iv) − gH_i·p_iv·(log p_iv + H_i)      g, gH: upstream gradients

The backward pass computes z again, block by block, or reads the probabilities that `save_probs` kept.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ._chunked import LinearStats, linear_backward, linear_forward, saved_shapes
from ._dispatch import FLOATS_TORCH, INDICES, check_tensor, describe, resolve_backend, values_checked
from ._layout import compute_dtype


def _stats(
    hidden, weight, targets, bias, temperature, softcap, ignore_index, entropy, save_probs, backend
) -> LinearStats:
    """Row statistics over this weight's vocabulary; rows whose target is ignore_index may hold anything."""
    valid = targets != ignore_index
    # Kept probabilities stay [N, V]: leaving rows out would need a second copy of them.
    rows = None if save_probs or bool(valid.all()) else valid.nonzero()[:, 0]
    if rows is None:
        return linear_forward(hidden, weight, targets, bias, temperature, softcap, entropy, save_probs)
    stats = linear_forward(hidden[rows], weight, targets[rows], bias, temperature, softcap, entropy)
    n = hidden.shape[0]
    spread = [x.new_zeros(n).index_copy_(0, rows, x) if x.numel() else x for x in stats[:3]]
    return LinearStats(*spread, stats.saved, stats.shift)


def _merge_logp(stats: LinearStats, targets: Tensor, ignore_index: int, vocab: int) -> tuple[Tensor, Tensor]:
    """(logp, entropy): 0 where ignored, NaN where the target is outside the vocabulary."""
    logp = stats.target_logit - stats.lse
    ignored = targets == ignore_index
    logp = torch.where((targets >= 0) & (targets < vocab), logp, torch.nan).masked_fill_(ignored, 0)
    return logp, stats.entropy.masked_fill(ignored, 0) if stats.entropy.numel() else stats.entropy


@torch.library.custom_op("rto_kernels::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    entropy: bool,
    save_probs: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    stats = _stats(
        hidden, weight, targets, bias, temperature, softcap, ignore_index, entropy, save_probs, backend
    )
    logp, row_entropy = _merge_logp(stats, targets, ignore_index, weight.shape[0])
    return logp, row_entropy, stats.lse, stats.saved, stats.shift


@_linear_logprob.register_fake
def _(hidden, weight, targets, bias, temperature, softcap, ignore_index, entropy, save_probs, backend):
    n, vocab = hidden.shape[0], weight.shape[0]
    row = hidden.new_empty(n, dtype=compute_dtype(hidden))
    saved, shift = saved_shapes(n, vocab) if save_probs else ((0,), (0,))
    return (
        row,
        torch.empty_like(row) if entropy else row.new_empty(0),
        torch.empty_like(row),
        row.new_empty(saved, dtype=torch.bfloat16),
        row.new_empty(shift),
    )


@torch.library.custom_op("rto_kernels::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    lse: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    saved: Tensor,
    shift: Tensor,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return linear_backward(
        hidden, weight, targets, bias, temperature, softcap, lse, entropy, grad_logp, grad_entropy,
        needs, saved, shift,
    )  # fmt: skip


@_linear_logprob_backward.register_fake
def _(hidden, weight, targets, bias, temperature, softcap, lse, entropy, g, ge, saved, shift, needs, backend):
    need_hidden, need_weight, need_bias = needs
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else weight.new_empty(0),
        torch.empty_like(bias, memory_format=torch.contiguous_format) if need_bias else hidden.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, bias, temperature, softcap, ignore_index, _, _, backend = inputs
    _, entropy, lse, saved, shift = output
    ctx.save_for_backward(hidden, weight, targets, bias, lse, entropy, saved, shift)
    ctx.mark_non_differentiable(lse, saved, shift)
    ctx.set_materialize_grads(False)
    ctx.args = temperature, softcap, ignore_index, backend


def _mask_upstream(grad: Tensor | None, ignored: Tensor) -> Tensor | None:
    return None if grad is None else grad.masked_fill(ignored, 0)


def _backward(ctx, grad_logp, grad_entropy, *_):
    hidden, weight, targets, bias, lse, entropy, saved, shift = ctx.saved_tensors
    temperature, softcap, ignore_index, backend = ctx.args
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    if grad_logp is None and grad_entropy is None:
        return (None,) * 10
    ignored = targets == ignore_index
    grads = _linear_logprob_backward(
        hidden, weight, targets, bias, temperature, softcap, lse, entropy,
        _mask_upstream(grad_logp, ignored), _mask_upstream(grad_entropy, ignored),
        saved, shift, needs, backend,
    )  # fmt: skip
    d_hidden, d_weight, d_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return d_hidden, d_weight, None, d_bias, *(None,) * 6


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)


class _ShardedLogprob(torch.autograd.Function):
    """The same over a vocabulary split across `group`: every rank gets all the rows' results."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, options, group):
        temperature, softcap, entropy, save_probs, backend = options
        stats = _stats(
            hidden, weight, targets, bias, temperature, softcap, -1, entropy, save_probs, backend
        )
        mine = torch.stack([x for x in stats[:3] if x.numel() or not x.shape[0] == 0] or [stats.lse])
        raise NotImplementedError
