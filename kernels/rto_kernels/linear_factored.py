"""Gradients of log-probs from probabilities that were kept with one shift a row: two vendor matrix products.

    E_iv  = exp(z_iv − s_i)                     kept in bf16 by the forward pass, s_i near row i's log-sum-exp
    p_iv  = E_iv·exp(s_i − lse_i)
    dz_iv = g_i·(onehot_iv − p_iv) = r_i·D_iv   r_i = −g_i·exp(s_i − lse_i)
    D_iv  = E_iv, but (p_iv − 1)/exp(s_i − lse_i) at the target
    d(hidden) = r ⊙ (D·W)                       d(weight) = Dᵀ·(r ⊙ hidden)

So no pass over the [N, V] matrix makes dz of E: one number a row is written over. The caller knows s before the
forward pass: PPO's old log-prob is within a few nats of the new one, and s_i = z_i,target − old_logp_i.

Where s is further than 40 nats from the log-sum-exp, r or E leaves bf16's range. In PPO the ratio there is below
e^−40, and so is the gradient, or above e^40, and the loss itself is about to overflow.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from ._dispatch import INTERPRET, launching
from ._math import LOG2E, expm1
from ._vocab_torch import Head, LinearStats, product
from .linear_forward import LinearLaunch

BLOCK = 32 if INTERPRET else 1024


@triton.jit
def linear_shift_kernel(
    h_ptr, w_ptr, targets_ptr, old_logp_ptr, inside_ptr, clean_ptr, shift_ptr,
    width, vocab, stride_h, stride_w, temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: shift = (z of the target − old_logp)·log₂e, and the row itself, zeros outside the mask."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    inside = tl.load(inside_ptr + row) != 0
    target = tl.load(targets_ptr + row).to(tl.int64)
    known = inside & (target >= 0) & (target < vocab)
    target = tl.where(known, target, 0)
    dot = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + offs
        h = tl.load(h_ptr + row * stride_h + at, mask=at < width, other=0.0)
        h = tl.where(inside, h, 0.0)
        w = tl.load(w_ptr + target * stride_w + at, mask=at < width, other=0.0)
        dot += h.to(tl.float32) * w.to(tl.float32)
        tl.store(clean_ptr + row * width + at, h, mask=at < width)
    z = tl.sum(dot, 0) / temperature
    old_logp = tl.load(old_logp_ptr + row).to(tl.float32)
    tl.store(shift_ptr + row, tl.where(known, (z - old_logp) * LOG2E, 0.0))


@triton.jit
def linear_factor_kernel(
    saved_ptr, h_ptr, targets_ptr, logp_ptr, lse_ptr, shift_ptr, g_ptr, factor_ptr, scaled_ptr,
    width, vocab, stride_saved, temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: r, r ⊙ hidden in its dtype, and the target's D written over its E."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row).to(tl.int64)
    g = tl.load(g_ptr + row)
    share = tl.exp2(tl.load(shift_ptr + row) - tl.load(lse_ptr + row) * LOG2E)
    factor = tl.where(g == 0, 0.0, -g * share / temperature)
    tl.store(factor_ptr + row, factor)
    # With r = 0 the row counts for nothing, and D might be infinite: 0 · inf would reach the other rows' d(weight).
    if (target >= 0) & (target < vocab) & (factor != 0):
        d = expm1(tl.load(logp_ptr + row)) / share
        tl.store(saved_ptr + row * stride_saved + target, d.to(saved_ptr.dtype.element_ty))
    for start in range(0, width, BLOCK):
        at = start + offs
        h = tl.load(h_ptr + row * width + at, mask=at < width, other=0.0).to(tl.float32)
        tl.store(scaled_ptr + row * width + at, (h * factor).to(scaled_ptr.dtype.element_ty), mask=at < width)


@triton.jit
def linear_rescale_kernel(x_ptr, factor_ptr, out_ptr, width, stride_out, BLOCK: tl.constexpr):
    """One program a row: out = factor·x in out's dtype, 0 where the factor is."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    factor = tl.load(factor_ptr + row)
    for start in range(0, width, BLOCK):
        at = start + offs
        x = tl.load(x_ptr + row * width + at, mask=at < width, other=0.0)
        x = tl.where(factor == 0, 0.0, x * factor)
        tl.store(out_ptr + row * stride_out + at, x.to(out_ptr.dtype.element_ty), mask=at < width)


def row_shifts(hidden: Tensor, targets: Tensor, head: Head, old_logp: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden [N, H] with zeros outside the mask, s·log₂e [N] fp32)."""
    (n, width), vocab = hidden.shape, head.weight.shape[0]
    run = LinearLaunch(hidden, head)
    hidden = run.rows(hidden)
    clean = torch.empty((n, width), dtype=hidden.dtype, device=hidden.device)
    shift = torch.empty(n, dtype=torch.float32, device=hidden.device)
    with launching("linear_shift", hidden.device):
        linear_shift_kernel[(n,)](
            hidden, run.weight, targets.contiguous(), old_logp.contiguous(), inside.contiguous().view(torch.uint8),
            clean, shift, width, vocab, hidden.stride(0), run.weight.stride(0), head.temperature,
            BLOCK=BLOCK, num_warps=4, **tiles.FUSION,
        )  # fmt: skip
    return clean, shift


def linear_backward_factored(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    stats: LinearStats,
    grad_logp: Tensor,
    d_hidden: Tensor | None,
    need_weight: bool,
    into: Tensor | None = None,
) -> Tensor | None:
    """Gradients of Σ grad_logp·logp, from `stats.saved` = E, which is used up, and `stats.shift` = s·log₂e [N].

    hidden is what `row_shifts` gave. d(hidden) is written to `d_hidden` [N, H], if given; d(weight) [V, H] is returned,
    in the weight's dtype, or added to `into` (fp32). A row whose grad_logp is 0 takes and gives exactly 0.
    """
    (n, width), vocab = hidden.shape, head.weight.shape[0]
    factor = torch.empty(n, dtype=torch.float32, device=hidden.device)
    scaled = torch.empty_like(hidden)
    with launching("linear_factor", hidden.device):
        linear_factor_kernel[(n,)](
            stats.saved, hidden, targets.contiguous(), stats.logp, stats.lse, stats.shift,
            grad_logp.float().contiguous(), factor, scaled, width, vocab, stats.saved.stride(0), head.temperature,
            BLOCK=BLOCK, num_warps=4, **tiles.FUSION,
        )  # fmt: skip
    d = stats.saved[:, :vocab]
    if d_hidden is not None:
        with launching("linear_rescale", hidden.device):
            linear_rescale_kernel[(n,)](
                product(d, head.weight, torch.float32), factor, d_hidden, width, d_hidden.stride(0),
                BLOCK=BLOCK, num_warps=4, **tiles.FUSION,
            )  # fmt: skip
    return product(d.t(), scaled, head.weight.dtype, into) if need_weight else None
