"""KL divergence of two next-token distributions from hidden states, token by token; logits are never whole.

    z = softcap · tanh(a / softcap), or a;   a = hidden · Wᵀ + bias          z_ref likewise from ref_hidden, ref_weight
    p = softmax(z),   p_ref = softmax(z_ref)
    KL(p_ref ‖ p)_t = Σ_v p_ref · (z_ref − z) − lse_ref + lse
    d KL / dz       = p − p_ref

Blocks are at most [BLOCK_TOKENS, BLOCK_VOCAB] as in `_vocab_torch`, the arithmetic is fp32 (fp64 for fp64 inputs), with
16-bit operands multiplied as such on a GPU. The
backward pass computes both blocks of logits again; rows without upstream gradient are left out. The function is
plain PyTorch on every device, on a GPU too, with the vendor's matrix product.
"""

import torch
from torch import Tensor

from ._dispatch import FLOATS_TORCH, batch_invariant, check_tensor, check_unreleased
from ._layout import compute_dtype
from ._vocab_torch import Head, _token_blocks, operand_dtype, product


def _logits(head: Head, h: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """z [rows, columns] in `dtype`, from operands in theirs."""
    if h.dtype == dtype:
        return head.logits(h, weight, bias, h.new_empty(h.shape[0], weight.shape[0]))
    z = product(h, weight.t(), dtype)
    if bias is not None:
        z.add_(bias)
    return z.div_(head.softcap).tanh_().mul_(head.softcap) if head.softcap else z


def _forward(h: Tensor, head: Head, h_ref: Tensor, ref_head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states -> (KL, lse, lse_ref), each [N] in the compute dtype, by one online pass over the vocabulary."""
    n, dtype = h.shape[0], compute_dtype(h)
    peak, peak_ref = (h.new_full((n,), -torch.inf, dtype=dtype) for _ in range(2))
    # weighted: Σ exp(z_ref − peak_ref)·(z_ref − z)
    total, total_ref, weighted = (h.new_zeros(n, dtype=dtype) for _ in range(3))
    for (_, _, w, b), (_, _, w_ref, b_ref) in zip(head.blocks(h.dtype), ref_head.blocks(h.dtype), strict=True):
        for rows in _token_blocks(n):
            z = _logits(head, h[rows], w, b, dtype)
            z_ref = _logits(ref_head, h_ref[rows], w_ref, b_ref, dtype)
            new = torch.maximum(peak[rows], z.amax(1))
            total[rows] = total[rows] * torch.exp(peak[rows] - new) + torch.exp(z - new[:, None]).sum(1)
            peak[rows] = new
            new = torch.maximum(peak_ref[rows], z_ref.amax(1))
            decay = torch.exp(peak_ref[rows] - new)
            e = torch.exp(z_ref - new[:, None])
            total_ref[rows] = total_ref[rows] * decay + e.sum(1)
            weighted[rows] = weighted[rows] * decay + e.mul_(z_ref.sub_(z)).sum(1)
            peak_ref[rows] = new
    lse, lse_ref = peak + total.log(), peak_ref + total_ref.log()
    return weighted / total_ref + (lse - lse_ref), lse, lse_ref


def _backward(
    h: Tensor, head: Head, h_ref: Tensor, ref_head: Head, lse: Tensor, lse_ref: Tensor, grad: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Σ grad·KL to hidden, weight and bias, in the compute dtype; None where not in `needs`."""
    need_hidden, need_weight, need_bias = needs
    dtype = compute_dtype(h)
    d_hidden = torch.zeros_like(h, dtype=dtype) if need_hidden else None
    d_weight = h.new_zeros(head.weight.shape, dtype=dtype) if need_weight else None
    d_bias = h.new_zeros(head.weight.shape[0], dtype=dtype) if need_bias else None
    for (_, columns, w, b), (_, _, w_ref, b_ref) in zip(head.blocks(h.dtype), ref_head.blocks(h.dtype), strict=True):
        for rows in _token_blocks(h.shape[0]):
            z = _logits(head, h[rows], w, b, dtype)
            p_ref = _logits(ref_head, h_ref[rows], w_ref, b_ref, dtype).sub_(lse_ref[rows, None]).exp_()
            dz = torch.exp(z - lse[rows, None]).sub_(p_ref).mul_(grad[rows, None])
            if head.softcap:
                dz.mul_(head.slope(z))
            if need_bias:
                d_bias[columns] += dz.sum(0)
            dz = dz.to(h.dtype)
            if need_hidden:
                product(dz, w, dtype, d_hidden[rows])
            if need_weight:
                product(dz.t(), h[rows], dtype, d_weight[columns])
    return d_hidden, d_weight, d_bias


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, softcap, ref_hidden, ref_weight, ref_bias, ref_softcap, by_row):
        dtype = compute_dtype(hidden) if by_row else operand_dtype(hidden)
        head = Head(weight, bias, 1.0, softcap, by_row)
        ref_head = Head(ref_weight, ref_bias, 1.0, ref_softcap, by_row)
        kl, lse, lse_ref = _forward(hidden.to(dtype), head, ref_hidden.to(dtype), ref_head)
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, lse, lse_ref)
        ctx.softcaps = softcap, ref_softcap
        ctx.size = weight.numel()
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, lse, lse_ref = ctx.saved_tensors
        head, ref_head = Head(weight, bias, 1.0, ctx.softcaps[0]), Head(ref_weight, ref_bias, 1.0, ctx.softcaps[1])
        check_unreleased("weight", weight, ctx.size)
        rows = (grad != 0).nonzero()[:, 0]
        dtype = operand_dtype(hidden)
        d_hidden, d_weight, d_bias = _backward(
            hidden[rows].to(dtype), head, ref_hidden[rows].to(dtype), ref_head, lse[rows], lse_ref[rows],
            grad[rows].to(compute_dtype(hidden)), list(ctx.needs_input_grad[:3]),
        )  # fmt: skip
        if d_hidden is not None:
            d_hidden = torch.zeros_like(hidden).index_copy_(0, rows, d_hidden.to(hidden.dtype))
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        if d_bias is not None:
            d_bias = d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, *(None,) * 6


def token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    deterministic: str | None = None,
) -> Tensor:
    """KL(p_ref ‖ p) of each token's next-token distribution, nats; see the top of this file.

    hidden      [N, H] bf16, fp16, fp32 or fp64; weight [V, H] of its dtype; bias [V] or None
    ref_hidden  [N, H'] of the same dtype; ref_weight [V, H'] (H' may differ, the vocabulary may not); ref_bias
    returns     [N] fp32 (fp64 for fp64)

    Differentiable once, in hidden, weight and bias; the reference takes no gradient. Peak memory beyond inputs and
    gradients is a few blocks, whatever N · V. On a GPU the backward pass waits for the device once, to leave rows
    out. `deterministic="batch"`: a token's bits do not depend on the others, at the cost of one row a product.
    Raises ValueError for a wrong shape, dtype or device.
    """
    check_tensor("hidden", hidden, shape=(None, None), expect="[N, H]", dtypes=FLOATS_TORCH)
    n, width = hidden.shape
    same = {"dtypes": (hidden.dtype,), "device": hidden.device}
    check_tensor("weight", weight, shape=(None, width), expect=f"[V, {width}] like hidden", **same)
    vocab = weight.shape[0]
    check_tensor("ref_hidden", ref_hidden, shape=(n, None), expect=f"[{n}, H'] like hidden", **same)
    wide = (vocab, ref_hidden.shape[1])
    check_tensor("ref_weight", ref_weight, shape=wide, expect=f"{list(wide)} like weight and ref_hidden", **same)
    for name, x in (("bias", bias), ("ref_bias", ref_bias)):
        if x is not None:
            check_tensor(name, x, shape=(vocab,), expect=f"[{vocab}] like weight", **same)
    for name, cap in (("softcap", softcap), ("ref_softcap", ref_softcap)):
        if cap is not None and not cap >= 0:
            raise ValueError(f"{name} must be a positive number, or None or 0 for off, got {cap}")
    if vocab == 0:
        raise ValueError("weight must have at least one row (a vocabulary), got [0, ...]")
    return _TokenKL.apply(
        hidden, weight, bias, float(softcap or 0.0), ref_hidden.detach(), ref_weight.detach(),
        None if ref_bias is None else ref_bias.detach(), float(ref_softcap or 0.0), batch_invariant(deterministic),
    )  # fmt: skip
