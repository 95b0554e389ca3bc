"""The vocabulary-sized passes in plain PyTorch, block by block: the path of tensors on a CPU.

    a = hidden · Wᵀ + bias                       [N, V], never whole
    z = softcap · tanh(a / softcap) / temperature, or a / temperature
    lse = log Σ exp(z),  entropy = −Σ p · log p,  p = exp(z − lse)

Blocks are at most [BLOCK_TOKENS, BLOCK_VOCAB], so memory does not grow with N · V, and a small problem is one
block. The arithmetic is fp32 (fp64 for fp64 inputs) whatever the dtype of hidden and weight: a block of the
weight is widened, multiplied and forgotten. A target outside [0, V) selects no column: that is how a
vocabulary shard says "the target is on another rank".
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


class Extras(NamedTuple):
    """By-products of the pass that a caller may ask for, each without a gradient."""

    mean_logits: bool = False
    is_top1: bool = False
    log_sum_sq_probs: bool = False


NO_EXTRAS = Extras()


class Found(NamedTuple):
    """What `Extras` asked for; [0] where it did not."""

    mean_logits: Tensor  # [N] Σ z / V, 0 where ignored
    is_top1: Tensor  # [N] bool, whether the target is the arg max of z, of equals the first; False where ignored
    log_sum_sq_probs: Tensor  # [N] log Σ p², 0 where ignored


class LinearStats(NamedTuple):
    """One pass over the vocabulary. `saved` and `shift` hold exp(z − shift) where probabilities are kept."""

    logp: Tensor  # [N], 0 where the target is ignore_index, NaN where it selects no column
    entropy: Tensor  # [N], 0 where ignored; [0] when not asked for
    lse: Tensor  # [N], anything where ignored
    saved: Tensor  # [N, K] bf16 or the compute dtype, K the first columns that are kept; or [0]
    shift: Tensor  # [vocabulary blocks, N], the K columns' first, or [0]
    found: Found | None = None  # after a forward pass


class Head(NamedTuple):
    """What turns hidden states into z."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    temperature: float
    softcap: float  # 0: off
    by_row: bool = False  # a product for each row: see `product`

    def scaled(self, hidden: Tensor) -> Tensor:
        """Hidden in the compute dtype; a linear z takes its 1/temperature here, where it costs least."""
        h = hidden.to(compute_dtype(hidden))
        return h if self.softcap or self.temperature == 1.0 else h / self.temperature

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[int, slice, Tensor, Tensor | None]]:
        """(index, columns, weight block, bias block), both in `dtype`."""
        for index, start in enumerate(range(0, self.weight.shape[0], BLOCK_VOCAB)):
            columns = slice(start, min(start + BLOCK_VOCAB, self.weight.shape[0]))
            bias = None if self.bias is None else self.bias[columns].to(dtype)
            yield index, columns, self.weight[columns].to(dtype), bias

    def product(self, h: Tensor, weight: Tensor, out: Tensor) -> None:
        """h · weightᵀ into out. The order in which a vendor's matrix product adds up depends on the number of
        rows and on a row's place among them; `by_row` multiplies each by itself, in memory of one alignment,
        so that its bits depend on nothing else."""
        if not self.by_row:
            torch.mm(h, weight.t(), out=out)
            return
        x, y = h.new_empty(h.shape[1]), h.new_empty(weight.shape[0])
        for row in range(h.shape[0]):
            out[row] = torch.mv(weight, x.copy_(h[row]), out=y)

    def logits(self, h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        self.product(h, weight, out)
        if bias is not None:
            out.add_(bias if self.softcap else bias / self.temperature)
        if self.softcap:
            out.div_(self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return out

    def slope(self, z: Tensor) -> Tensor:
        """dz/da under the soft-cap, over `z`."""
        z = z.mul_(self.temperature / self.softcap).square_().neg_().add_(1)
        return z.clamp_(min=0).div_(self.temperature)


def product(a: Tensor, b: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
    """a·b summed and returned in `dtype`, or added to `into`, which has it. 16-bit operands are multiplied as such
    where there are matrix units for them, on a GPU."""
    if a.dtype == dtype and into is None:
        return torch.mm(a, b)
    wide = dtype if into is None else into.dtype
    if a.dtype == wide or not a.is_cuda:
        a, b = a.to(wide), b.to(wide)
        return torch.mm(a, b) if into is None else into.addmm_(a, b)
    if into is None:
        return torch.mm(a, b, out_dtype=wide)
    return torch.addmm(into, a, b, out_dtype=wide, out=into)


def operand_dtype(x: Tensor) -> torch.dtype:
    """Of a vendor product's operands: their own on a GPU, else the compute dtype, which a CPU multiplies as fast."""
    return x.dtype if x.is_cuda else compute_dtype(x)


def kept_columns(vocab: int, share: float, block: int) -> int:
    """How many columns a share of the vocabulary is: all, or whole blocks of it, at least one."""
    return vocab if share >= 1 else min(vocab, max(1, int(share * vocab) // block) * block)


def saved_shapes(hidden: Tensor, head: Head, share: float = 1.0) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of `saved` and `shift`."""
    kept = kept_columns(head.weight.shape[0], share, BLOCK_VOCAB)
    return (hidden.shape[0], kept), (-(-kept // BLOCK_VOCAB), hidden.shape[0])


def _token_blocks(tokens: int) -> list[slice]:
    return [slice(i, min(i + BLOCK_TOKENS, tokens)) for i in range(0, tokens, BLOCK_TOKENS)]


class _Scratch:
    """One buffer, lent out as contiguous [rows, columns] matrices."""

    def __init__(self, like: Tensor, tokens: int, vocab: int):
        self.flat = like.new_empty(min(tokens, BLOCK_TOKENS) * min(vocab, BLOCK_VOCAB))

    def matrix(self, rows: int, columns: int) -> Tensor:
        return self.flat[: rows * columns].view(rows, columns)


def _columns_of(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """(column of each target inside the block, whether it has one)."""
    local = targets - columns.start
    return local, (local >= 0) & (local < columns.stop - columns.start)


def linear_forward(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    ignore_index: int,
    want_entropy: bool = False,
    save_dtype: torch.dtype | None = None,
    save_share: float = 1.0,
    extras: Extras = NO_EXTRAS,
) -> LinearStats:
    """hidden [N, H], targets [N] → the rows' statistics in the compute dtype."""
    ignored = targets == ignore_index
    # Kept probabilities stay [N, V]: leaving rows out would need a second copy of them.
    if save_dtype is None and bool(ignored.any()):
        rows = (~ignored).nonzero()[:, 0]
        stats = linear_forward(hidden[rows], targets[rows], head, ignore_index, want_entropy, extras=extras)

        def spread(x: Tensor, wanted: bool = True) -> Tensor:
            return x.new_zeros(hidden.shape[0]).index_copy_(0, rows, x) if wanted else x

        found = Found(*map(spread, stats.found, extras))
        entropy = spread(stats.entropy, want_entropy)
        return LinearStats(spread(stats.logp), entropy, spread(stats.lse), stats.saved, stats.shift, found)
    n, vocab = hidden.shape[0], head.weight.shape[0]
    dtype = compute_dtype(hidden)
    h = head.scaled(hidden)
    peak = h.new_full((n,), -torch.inf)
    total = h.new_zeros(n)
    weighted = h.new_zeros(n if want_entropy else 0)  # Σ exp(z − peak)·(z − peak)
    target_logit = h.new_full((n,), torch.nan)
    summed = h.new_zeros(n if extras.mean_logits else 0)
    best = targets.new_full((n if extras.is_top1 else 0,), -1)  # the arg max
    squares = h.new_zeros(n if extras.log_sum_sq_probs else 0)  # Σ exp(z − peak)²
    shape, shifts = saved_shapes(hidden, head, save_share) if save_dtype else ((0, 0), 0)
    saved = h.new_empty(shape if save_dtype else 0, dtype=save_dtype or torch.bfloat16)
    shift = h.new_empty(shifts)
    in_place = save_dtype == dtype and not want_entropy
    scratch = None if in_place and shape[1] == vocab else _Scratch(h, n, vocab)
    for index, columns, w, b in head.blocks(dtype):
        for rows in _token_blocks(n):
            size = (rows.stop - rows.start, columns.stop - columns.start)
            kept = columns.stop <= shape[1]
            z = head.logits(h[rows], w, b, saved[rows, columns] if in_place and kept else scratch.matrix(*size))
            local, here = _columns_of(targets[rows], columns)
            picked = z.gather(1, local.clamp(0, size[1] - 1).long()[:, None])[:, 0]
            target_logit[rows] = torch.where(here, picked, target_logit[rows])
            if extras.mean_logits:
                summed[rows] += z.sum(1)
            if extras.is_top1:
                highest, at = z.max(1)  # of equals the first
                best[rows] = torch.where(highest > peak[rows], (at + columns.start).to(best.dtype), best[rows])
            old, new = peak[rows], torch.maximum(peak[rows], z.amax(1))
            base = torch.where(new == -torch.inf, 0.0, new)  # a row of −inf alone must not give NaN here
            z.sub_(base[:, None])
            # exp(−inf − base) = 0; before the first finite logit `total` is 0 as well.
            decay = torch.exp(old - base)
            if want_entropy:
                z.clamp_(min=FLOOR)
                e = z.exp()
                moved = (old - base).clamp(min=FLOOR)
                weighted[rows] = decay * (weighted[rows] + total[rows] * moved) + z.mul_(e).sum(1)
            else:
                e = z.exp_()
            if extras.log_sum_sq_probs:
                squares[rows] = squares[rows] * decay.square() + e.square().sum(1)
            total[rows] = total[rows] * decay + e.sum(1)
            peak[rows] = new
            if kept:
                shift[index, rows] = base
                if not in_place:
                    saved[rows, columns] = e
    # log p = z − peak − log(total), so the peaks cancel before they can cost digits.
    entropy = torch.log(total) - weighted / total if want_entropy else weighted
    logp = (target_logit - peak - torch.log(total)).masked_fill_(ignored, 0)
    entropy = entropy.masked_fill_(ignored, 0) if want_entropy else entropy
    found = Found(
        (summed / vocab).masked_fill_(ignored, 0) if extras.mean_logits else summed,
        (best == targets) & ~ignored if extras.is_top1 else ignored.new_empty(0),
        (squares.log() - 2 * total.log()).masked_fill_(ignored, 0) if extras.log_sum_sq_probs else squares,
    )
    return LinearStats(logp, entropy, peak + torch.log(total), saved, shift, found)


class LinearGrads(NamedTuple):
    """In the compute dtype, None where not needed."""

    hidden: Tensor | None  # [N, H]
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]


class _Active(NamedTuple):
    """The rows that have an upstream gradient, [n ≤ N], in the compute dtype."""

    index: Tensor | None  # None: all rows
    hidden: Tensor  # scaled
    targets: Tensor
    logp: Tensor
    lse: Tensor
    entropy: Tensor | None  # None without grad_entropy
    grad_logp: Tensor
    grad_entropy: Tensor | None


def _active_rows(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    stats: LinearStats,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
) -> _Active:
    if grad_logp is None:
        grad_logp = torch.zeros_like(grad_entropy)
    active = grad_logp != 0 if grad_entropy is None else (grad_logp != 0) | (grad_entropy != 0)
    index = None if bool(active.all()) else active.nonzero()[:, 0]
    entropy = None if grad_entropy is None else stats.entropy
    rows = (hidden, targets, stats.logp, stats.lse, entropy, grad_logp, grad_entropy)
    h, *rest = rows if index is None else (None if x is None else x[index] for x in rows)
    return _Active(index, head.scaled(h), *rest)


class _Block(NamedTuple):
    """A block of z, or of exp(z − shift) where the forward pass kept that: log p = z − centre."""

    x: Tensor  # [rows, columns], used up by p or log_p
    centre: Tensor  # [rows, 1]: lse, or lse − shift
    kept: bool

    def p(self) -> Tensor:
        return self.x.mul_(torch.exp(-self.centre)) if self.kept else self.x.sub_(self.centre).exp_()

    def log_p(self) -> Tensor:
        return (self.x.log_().clamp_(min=FLOOR) if self.kept else self.x).sub_(self.centre)


class _Logits:
    """Blocks of z for the active rows: kept in the compute dtype, kept in 16 bits, or computed again."""

    def __init__(self, head: Head, stats: LinearStats, active: _Active):
        self.head, self.stats, self.active = head, stats, active
        self.columns = stats.saved.shape[1] if stats.saved.numel() else 0
        self.in_place = active.index is None and stats.saved.dtype == active.hidden.dtype
        self.scratch = _Scratch(active.hidden, active.hidden.shape[0], head.weight.shape[0])

    def block(self, index: int, rows: slice, columns: slice, weight: Tensor, bias: Tensor | None) -> _Block:
        lse = self.active.lse[rows, None]
        if columns.stop <= self.columns:
            return self._kept(index, rows, columns, lse)
        z = self.scratch.matrix(rows.stop - rows.start, columns.stop - columns.start)
        return _Block(self.head.logits(self.active.hidden[rows], weight, bias, z), lse, False)

    def _kept(self, index: int, rows: slice, columns: slice, lse: Tensor) -> _Block:
        saved, shift = self.stats.saved, self.stats.shift[index]
        if self.in_place:
            return _Block(saved[rows, columns], lse - shift[rows, None], True)
        there = rows if self.active.index is None else self.active.index[rows]
        e = self.scratch.matrix(rows.stop - rows.start, columns.stop - columns.start)
        return _Block(e.copy_(saved[there, columns]), lse - shift[there][:, None], True)


def _dz_over_g(block: _Block, at_target: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """−dz/grad_logp = p − onehot: the row factor stays out of the block."""
    dz = block.p()
    dz[target] = at_target
    return dz


def _dz(
    block: _Block, at_target: Tensor, target: tuple[Tensor, Tensor], head: Head, active: _Active, rows: slice
) -> Tensor:
    """dz with all factors, the soft-cap's slope included."""
    log_p = block.log_p()
    p, g = log_p.exp(), active.grad_logp[rows, None]
    slope = head.slope(log_p + active.lse[rows, None]) if head.softcap else None
    if active.grad_entropy is None:
        dz = p.mul_(-g)
    else:
        dz = log_p.clamp_(min=FLOOR).add_(active.entropy[rows, None])
        dz.mul_(-active.grad_entropy[rows, None]).sub_(g).mul_(p)
    dz[target] = at_target
    return dz if slope is None else dz.mul_(slope)


def _dz_at_targets(active: _Active, factored: bool) -> Tensor:
    """dz, or −dz/grad_logp, in the targets' columns, [n], before the slope.

    There p − 1 is expm1(logp), which is exact near 0; z − lse is as far off as the rounding of two large numbers.
    """
    missing, logp = torch.expm1(active.logp), active.logp
    if factored:
        return missing
    at_target = -active.grad_logp * missing
    if active.grad_entropy is not None:
        at_target -= active.grad_entropy * logp.exp() * (logp.clamp(min=FLOOR) + active.entropy)
    return at_target


def linear_backward(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    stats: LinearStats,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    needs: Sequence[bool],
    into: LinearGrads | None = None,
) -> LinearGrads:
    """Gradients of Σ grad_logp·logp + grad_entropy·entropy; d(weight) is in the weight's dtype.

    dz = grad_logp·(onehot − p) − grad_entropy·p·(log p + entropy)

    Without entropy and soft-cap the row factor grad_logp leaves the [tokens, vocabulary] block: it scales
    hidden on one side and d(hidden) on the other. Rows whose upstream gradients are 0 are left out.
    With `into`, d(weight) and d(bias) are added to its tensors, which are in the compute dtype. `stats.saved`
    is used up where it is in the compute dtype.
    """
    need_hidden, need_weight, need_bias = needs
    active = _active_rows(hidden, targets, head, stats, grad_logp, grad_entropy)
    h, g, dtype = active.hidden, active.grad_logp, active.hidden.dtype
    n = h.shape[0]
    factored = grad_entropy is None and not head.softcap
    scale = 1.0 if head.softcap else 1.0 / head.temperature  # dz/da, where it is a constant
    at_target = _dz_at_targets(active, factored)
    # What multiplies a block from the token side: d(weight) = blockᵀ · left, d(bias) = blockᵀ · factor.
    factor = -g if factored else h.new_ones(n)
    left = h * factor[:, None] if factored else h
    d_hidden = h.new_zeros(h.shape) if need_hidden else None
    if into is not None:
        d_weight, d_bias = into.weight, into.bias
    else:
        d_weight = head.weight.new_empty(head.weight.shape) if need_weight else None
        d_bias = h.new_zeros(head.weight.shape[0]) if need_bias else None
    narrow = need_weight and into is None and head.weight.dtype != dtype  # a block is summed wide, then narrowed
    logits = _Logits(head, stats, active)
    for index, columns, w, b in head.blocks(dtype):
        if need_weight:
            dw = h.new_empty(w.shape) if narrow else d_weight[columns]
            if into is None and n == 0:
                dw.zero_()
        for rows in _token_blocks(n):
            local, here = _columns_of(active.targets[rows], columns)
            here = here.nonzero()[:, 0]
            target, values = (here, local[here]), at_target[rows][here]
            block = logits.block(index, rows, columns, w, b)
            dz = _dz_over_g(block, values, target) if factored else _dz(block, values, target, head, active, rows)
            if need_hidden:
                d_hidden[rows].addmm_(dz, w)
            if need_weight:
                dw.addmm_(dz.t(), left[rows], beta=0 if into is None and rows.start == 0 else 1)
            if need_bias:
                d_bias[columns].addmv_(dz.t(), factor[rows], alpha=scale)
        if narrow:
            d_weight[columns] = dw
    if need_hidden:
        d_hidden.mul_(-scale * g[:, None] if factored else scale)
        if active.index is not None:
            d_hidden = d_hidden.new_zeros(hidden.shape).index_copy_(0, active.index, d_hidden)
    return LinearGrads(d_hidden, d_weight, d_bias)
