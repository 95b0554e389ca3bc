"""The vocabulary-sized passes in plain PyTorch, block by block: the path of tensors on a CPU.

    a = hidden · Wᵀ + bias                       [N, V], never whole
    z = softcap · tanh(a / softcap) / temperature, or a / temperature
    lse = log Σ exp(z),  entropy = −Σ p · log p,  p = exp(z − lse)

Blocks are at most [BLOCK_TOKENS, BLOCK_VOCAB], so memory does not grow with N · V, and a small problem is one
block. The arithmetic is fp32 (fp64 for fp64 inputs) whatever the dtype of hidden and weight: a block of the weight is
widened, multiplied and forgotten. A target outside [0, V) selects no column: that is how a vocabulary shard
says "the target is on another rank".
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._layout import compute_dtype

BLOCK_TOKENS = 1024
BLOCK_VOCAB = 2048
# exp() of it is 0 in every dtype, and 0 · FLOOR is 0 where 0 · −inf would be NaN.
FLOOR = -1.0e5


class LinearStats(NamedTuple):
    """One pass over the vocabulary. `saved` and `shift` hold exp(z − shift) where probabilities are kept."""

    lse: Tensor  # [N]
    target_logit: Tensor  # [N], −inf where the target selects no column
    entropy: Tensor  # [N], or [0] when not asked for
    saved: Tensor  # [N, V] bf16, or [0]
    shift: Tensor  # [vocabulary blocks, N], or [0]


def saved_shapes(tokens: int, vocab: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of `saved` and `shift`."""
    return (tokens, vocab), (-(-vocab // min(vocab, BLOCK_VOCAB)), tokens)


def _spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, step):
        yield start, min(start + step, total)


def _scaled(hidden: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Hidden in the compute dtype; a linear z takes 1/temperature here, [N, H] being smaller than [N, V]."""
    h = hidden.to(compute_dtype(hidden))
    return h if softcap or temperature == 1.0 else h / temperature


def _block_logits(h, w, bias, temperature, softcap, out: Tensor) -> Tensor:
    torch.mm(h, w.t(), out=out)
    if bias is not None:
        out.add_(bias if softcap else bias / temperature)
    if softcap:
        out.div_(softcap).tanh_().mul_(softcap / temperature)
    return out


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    want_entropy: bool = False,
    save_probs: bool = False,
) -> LinearStats:
    """hidden [N, H], weight [V, H], targets [N] → statistics of the rows in the compute dtype."""
    (n, _), vocab = hidden.shape, weight.shape[0]
    dtype = compute_dtype(hidden)
    h = _scaled(hidden, temperature, softcap)
    block_n, block_v = max(1, min(n, BLOCK_TOKENS)), min(vocab, BLOCK_VOCAB)
    peak = h.new_full((n,), -torch.inf)
    total = h.new_zeros(n)
    weighted = h.new_zeros(n if want_entropy else 0)  # Σ exp(z − peak)·(z − peak)
    target_logit = h.new_full((n,), -torch.inf)
    kept, shifts = saved_shapes(n, vocab)
    saved = torch.empty(kept if save_probs else 0, dtype=torch.bfloat16, device=hidden.device)
    shift = h.new_zeros(shifts if save_probs else 0)
    buffer = h.new_empty(block_n * block_v)
    for index, (v0, v1) in enumerate(_spans(vocab, block_v)):
        w = weight[v0:v1].to(dtype)
        b = None if bias is None else bias[v0:v1].to(dtype)
        for n0, n1 in _spans(n, block_n):
            z = buffer[: (n1 - n0) * (v1 - v0)].view(n1 - n0, v1 - v0)
            _block_logits(h[n0:n1], w, b, temperature, softcap, z)
            local = targets[n0:n1] - v0
            picked = z.gather(1, local.clamp(0, v1 - v0 - 1)[:, None])[:, 0]
            here = (local >= 0) & (local < v1 - v0)
            target_logit[n0:n1] = torch.where(here, picked, target_logit[n0:n1])
            old, new = peak[n0:n1], torch.maximum(peak[n0:n1], z.amax(1))
            base = torch.where(new == -torch.inf, 0.0, new)  # a row of −inf alone must not give NaN here
            z.sub_(base[:, None])
            # exp(−inf − base) = 0; before the first finite logit `total` is 0 as well.
            decay = torch.exp(old - base)
            if want_entropy:
                z.clamp_(min=FLOOR)
                e = z.exp()
                moved = (old - base).clamp(min=FLOOR)
                weighted[n0:n1] = decay * (weighted[n0:n1] + total[n0:n1] * moved) + z.mul_(e).sum(1)
            else:
                e = z.exp_()
            total[n0:n1] = total[n0:n1] * decay + e.sum(1)
            peak[n0:n1] = new
            if save_probs:
                saved[n0:n1, v0:v1] = e
                shift[index, n0:n1] = base
    lse = peak + torch.log(total)
    # log p = z − peak − log(total), so the peaks cancel before they can cost digits.
    entropy = torch.log(total) - weighted / total if want_entropy else weighted
    return LinearStats(lse, target_logit, entropy, saved, shift)


def linear_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    lse: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    needs: Sequence[bool],
    saved: Tensor,
    shift: Tensor,
    wide: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Σ grad_logp·logp + grad_entropy·entropy, in the inputs' dtypes (d(hidden) in `wide` if given).

    dz = grad_logp·(onehot − p) − grad_entropy·p·(log p + entropy)

    Without entropy and soft-cap the row factor grad_logp leaves the [tokens, vocabulary] block: it scales
    hidden on one side and d(hidden) on the other. Rows whose upstream gradients are 0 are left out.
    A gradient that is not in `needs` is None; `saved` [0] means: compute the logits again.
    """
    need_hidden, need_weight, need_bias = needs
    width, vocab = hidden.shape[1], weight.shape[0]
    dtype = compute_dtype(hidden)
    if grad_logp is None:
        grad_logp = torch.zeros_like(grad_entropy)
    active = grad_logp != 0 if grad_entropy is None else (grad_logp != 0) | (grad_entropy != 0)
    use_saved = saved.numel() > 0
    rows = None if bool(active.all()) else active.nonzero()[:, 0]

    def pick(x: Tensor | None) -> Tensor | None:
        return x if x is None or rows is None else x[rows]

    h = _scaled(pick(hidden), temperature, softcap)
    t, lse, g, ge = pick(targets), pick(lse), pick(grad_logp), pick(grad_entropy)
    entropy = entropy if ge is None else pick(entropy)
    factored = ge is None and not softcap
    # What multiplies the block (p − onehot) from the token side: d(weight) = blockᵀ · left.
    left = h * -g[:, None] if factored else h
    n = h.shape[0]
    block_n, block_v = max(1, min(n, BLOCK_TOKENS)), min(vocab, BLOCK_VOCAB)
    d_hidden = h.new_zeros(n, width) if need_hidden else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else None
    d_bias = h.new_empty(vocab) if need_bias else None
    buffer = h.new_empty(block_n * block_v)
    narrow = need_weight and weight.dtype != dtype
    for index, (v0, v1) in enumerate(_spans(vocab, block_v)):
        w = weight[v0:v1].to(dtype)
        b = None if bias is None else bias[v0:v1].to(dtype)
        dw = None
        if need_weight:
            dw = h.new_zeros(v1 - v0, width) if narrow else d_weight[v0:v1].zero_()
        if need_bias:
            d_bias[v0:v1] = 0
        for n0, n1 in _spans(n, block_n):
            z = buffer[: (n1 - n0) * (v1 - v0)].view(n1 - n0, v1 - v0)
            centre = lse[n0:n1, None]
            if not use_saved:
                _block_logits(h[n0:n1], w, b, temperature, softcap, z)
            else:
                kept = saved[n0:n1, v0:v1] if rows is None else saved[rows[n0:n1], v0:v1]
                z.copy_(kept)
                centre = centre - pick(shift[index])[n0:n1, None]
            if factored:
                p = z.mul_(torch.exp(-centre)) if use_saved else z.sub_(centre).exp_()
            else:
                log_p = z.log_().clamp_(min=FLOOR).sub_(centre) if use_saved else z.sub_(centre)
                p = torch.exp(log_p)
            local = t[n0:n1] - v0
            here = ((local >= 0) & (local < v1 - v0)).nonzero()[:, 0]
            at = (here, local[here])
            if factored:
                p[at] -= 1
                dz = p
            else:
                # `log_p` becomes dz in place; `slope` = dz/da needs z before that.
                slope = None
                if softcap:
                    slope = (log_p + lse[n0:n1, None]).mul_(temperature / softcap).square_().neg_().add_(1)
                    slope.clamp_(min=0).div_(temperature)
                coefficient = -g[n0:n1, None]
                if ge is not None:
                    dz = log_p.clamp_(min=FLOOR).add_(entropy[n0:n1, None])
                    dz.mul_(-ge[n0:n1, None]).add_(coefficient).mul_(p)
                else:
                    dz = torch.mul(p, coefficient, out=log_p)
                dz[at] += g[n0:n1][here]
                if slope is not None:
                    dz.mul_(slope)
            if need_hidden:
                d_hidden[n0:n1].addmm_(dz, w)
            if need_weight:
                dw.addmm_(dz.t(), left[n0:n1])
            if need_bias:
                ones = -g[n0:n1] if factored else h.new_ones(n1 - n0)
                d_bias[v0:v1].addmv_(dz.t(), ones)
        if narrow:
            d_weight[v0:v1] = dw
    scale = 1.0 if softcap else 1.0 / temperature
    if need_hidden:
        if factored:
            d_hidden.mul_(-g[:, None])
        d_hidden.mul_(scale)
        d_hidden = d_hidden.to(wide or hidden.dtype)
        if rows is not None:
            d_hidden = d_hidden.new_zeros(hidden.shape).index_copy_(0, rows, d_hidden)
    if need_bias:
        d_bias = d_bias.mul_(scale).to(bias.dtype)
    return d_hidden, d_weight, d_bias
