"""The Triton forward pass of linear_logprob.py and linear_ppo.py, and what the backward pass shares with it.

    A program takes a block of rows through one split of the vocabulary, tile by tile, with the running
    (max, Σ exp, Σ exp·z, target logit) in registers; the splits are then merged in order. What `Extras` asks for,
    Σ z, the arg max and Σ exp², is carried beside them where it is asked for.

Logits exist in fp32 registers, in base-2 units (z·log₂e), and never in memory. Nothing is added atomically,
and the tiles and splits do not depend on the number of rows: a row's bits do not either.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles
from ._dispatch import INTERPRET, launching, on_grid
from ._math import FLOOR, LN2, LOG2E, NEG_INF, log2, tanh
from ._vocab_torch import NO_EXTRAS, Extras, Found, Head, LinearStats, kept_columns

# The interpreter keeps bf16 as its bits and would multiply those; there the operands are widened first.
WIDEN = tl.constexpr(INTERPRET)
GROUP = 16  # row blocks that walk the same vocabulary splits together, for the L2 cache
FORWARD_TOKENS = 32768  # per launch, which bounds the partial results
HIGHEST = tl.constexpr(100.0)  # log₂ of the largest number kept of a probability under a given shift
SAVED_ELEMENTS = 1 << 29  # of exp(z) that fused_linear_ppo_loss keeps at once


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_product(
    h, w, row0, col0, rows, vocab, width, stride_h, stride_w,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden·Wᵀ [BM, BN] of the rows from row0 and the vocabulary from col0, fp32."""
    acc = tl.zeros((BM, BN), tl.float32)
    if TMA:
        for k in range(0, width, BK):
            acc = dot(h.load([row0, k]), w.load([col0, k]).T, acc, PRECISION)
    else:
        r = row0 + tl.arange(0, BM)
        cols = col0 + tl.arange(0, BN)
        kk = tl.arange(0, BK)
        h_ptrs = h + r[:, None].to(tl.int64) * stride_h + kk[None, :]
        w_ptrs = w + cols[:, None].to(tl.int64) * stride_w + kk[None, :]
        for k in range(0, width, BK):
            inside = (k + kk < width)[None, :]
            a = tl.load(h_ptrs + k, mask=(r < rows)[:, None] & inside, other=0.0)
            b = tl.load(w_ptrs + k, mask=(cols < vocab)[:, None] & inside, other=0.0)
            acc = dot(a, b.T, acc, PRECISION)
    return acc


@triton.jit
def store_block(c, x, row0, col0, rows, columns, stride, TMA: tl.constexpr):
    """x to c [rows, columns] at (row0, col0), in c's dtype; what is outside is left out."""
    if TMA:
        c.store([row0, col0], x.to(c.dtype))
    else:
        r = row0 + tl.arange(0, x.shape[0])
        cols = col0 + tl.arange(0, x.shape[1])
        at = c + r[:, None].to(tl.int64) * stride + cols[None, :]
        tl.store(at, x.to(c.dtype.element_ty), mask=(r < rows)[:, None] & (cols < columns)[None, :])


@triton.jit
def halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """The left and right half of x [BM, BN]."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def tile_logits(acc, cols, bias_ptr, vocab, temperature, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """(z·temperature, −inf past the vocabulary; dz/da: a matrix under the soft-cap, else a number)."""
    slope = 1.0 / temperature
    if BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < vocab, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        bent = tanh(acc / softcap)
        acc = bent * softcap
        slope = (1.0 - bent * bent) / temperature
    return tl.where((cols < vocab)[None, :], acc, NEG_INF), slope


@triton.jit
def _absorb(
    acc, row0, col0, target, peak, total, weighted, picked, summed, best, squares, bias_ptr, saved, shift_ptr,
    rows, vocab, kept_columns, stride_saved, temperature, softcap,
    given, ENTROPY: tl.constexpr, SAVE: tl.constexpr, TMA: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    MEAN: tl.constexpr, TOP1: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """The running (max, Σ 2^(z − max), Σ 2^(z − max)·(z − max), target logit) after the columns of acc, and with MEAN
    Σ z, with TOP1 the first column of the max, with SQUARES Σ 4^(z − max).

    Sum, max and the target's logit are kept as z·temperature. They are subtracted before anything is scaled to base-2
    units: of the largest logit that leaves exactly 0, where a fused multiply-add would leave the product's rounding.
    """
    WIDTH: tl.constexpr = acc.shape[1]
    cols = col0 + tl.arange(0, WIDTH)
    scale = LOG2E / temperature
    z, _ = tile_logits(acc, cols, bias_ptr, vocab, temperature, softcap, BIAS, SOFTCAP)
    picked += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)
    if MEAN:
        summed += tl.sum(tl.where((cols < vocab)[None, :], z, 0.0), 1)
    highest = tl.max(z, 1)
    if TOP1:
        first = tl.min(tl.where(z == highest[:, None], cols[None, :], vocab), 1)
        best = tl.where(highest > peak, first, best)
    new = tl.maximum(peak, highest)
    base = tl.where(new == NEG_INF, 0.0, new)  # a row of −inf alone must not give NaN here
    moved = tl.maximum((peak - base) * scale, FLOOR)
    decay = tl.exp2(moved)
    z = (z - base[:, None]) * scale
    e = tl.exp2(z)
    base *= scale
    if ENTROPY:
        weighted = decay * (weighted + total * moved) + tl.sum(e * tl.maximum(z, FLOOR), 1)
    total = total * decay + tl.sum(e, 1)
    if SQUARES:
        squares = squares * decay * decay + tl.sum(e * e, 1)
    if SAVE == 2:
        # One shift a row, the caller's. Where it is absurdly low, the product with the kept numbers stays finite.
        e *= tl.exp2(tl.minimum(base - given, HIGHEST))[:, None]
        store_block(saved, e, row0, col0, rows, kept_columns, stride_saved, TMA)
    elif SAVE == 1:
        # The shift is the maximum itself: the largest probability is then kept as exactly 1, and what a confident
        # token's gradient is made of, 1 − p, is lost in no rounding.
        store_block(saved, e, row0, col0, rows, kept_columns, stride_saved, TMA)
        r = row0 + tl.arange(0, acc.shape[0])
        tl.store(shift_ptr + tl.cast(col0 // WIDTH, tl.int64) * rows + r, base, mask=r < rows)
    return new, total, weighted, picked, summed, best, squares


@triton.jit
def grouped_block(pid, row_blocks, columns, GROUP: tl.constexpr):
    """(row block, column block) of a program: GROUP row blocks go through the columns together, so that their rows stay
    in the L2 cache while the columns pass once."""
    first = pid // (GROUP * columns) * GROUP
    group = min(row_blocks - first, GROUP)
    local = pid % (GROUP * columns)
    return first + local % group, local // group


@triton.jit(do_not_specialize=["rows"])
def linear_stats_kernel(
    h, w, bias_ptr, targets_ptr, parts_ptr, saved, shift_ptr,
    rows, vocab, width, kept_columns, stride_h, stride_w, stride_saved, temperature, softcap,
    SPLITS: tl.constexpr, PER_SPLIT: tl.constexpr, ENTROPY: tl.constexpr, SAVE: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    MEAN: tl.constexpr, TOP1: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """parts [3 or more, SPLITS, rows]: max, Σ 2^(z − max), target logit, (ENTROPY) Σ 2^(z − max)·(z − max), (MEAN)
    Σ z·temperature, (TOP1) max·temperature and the bits of its first column, (SQUARES) Σ 4^(z − max).

    SAVE 1 keeps 2^(z − max so far) and writes that max to shift [tiles · PARTS, rows]; SAVE 2 keeps 2^(z − shift) with
    shift [rows] given.
    """
    PART: tl.constexpr = BN // PARTS
    block, split = grouped_block(tl.program_id(0), tl.cdiv(rows, BM), SPLITS, GROUP)
    row0 = block * BM
    r = row0 + tl.arange(0, BM)
    target = tl.load(targets_ptr + r, mask=r < rows, other=-1)
    target = tl.where((target >= 0) & (target < vocab), target, -1).to(tl.int32)
    peak = tl.full((BM,), NEG_INF, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    weighted = tl.zeros((BM,), tl.float32)
    picked = tl.zeros((BM,), tl.float32)
    summed = tl.zeros((BM,), tl.float32)
    best = tl.zeros((BM,), tl.int32)
    squares = tl.zeros((BM,), tl.float32)
    given = total
    if SAVE == 2:
        given = tl.load(shift_ptr + r, mask=r < rows, other=0.0)
    tiles_end = min((split + 1) * PER_SPLIT, tl.cdiv(vocab, BN))
    for tile in range(split * PER_SPLIT, tiles_end):
        col0 = tile * BN
        acc = tile_product(h, w, row0, col0, rows, vocab, width, stride_h, stride_w, BM, BN, BK, TMA, PRECISION)
        if PARTS == 2:
            acc, right = halves(acc, BM, BN)
        peak, total, weighted, picked, summed, best, squares = _absorb(
            acc, row0, col0, target, peak, total, weighted, picked, summed, best, squares,
            bias_ptr, saved, shift_ptr, rows, vocab, kept_columns, stride_saved, temperature, softcap,
            given, ENTROPY, SAVE, TMA, BIAS, SOFTCAP, MEAN, TOP1, SQUARES,
        )  # fmt: skip
        if PARTS == 2:
            peak, total, weighted, picked, summed, best, squares = _absorb(
                right, row0, col0 + PART, target, peak, total, weighted, picked, summed, best, squares,
                bias_ptr, saved, shift_ptr, rows, vocab, kept_columns, stride_saved, temperature, softcap,
                given, ENTROPY, SAVE, TMA, BIAS, SOFTCAP, MEAN, TOP1, SQUARES,
            )  # fmt: skip
    scale = LOG2E / temperature
    out = parts_ptr + tl.cast(split, tl.int64) * rows + r
    plane = tl.cast(rows, tl.int64) * SPLITS
    tl.store(out, peak * scale, mask=r < rows)
    tl.store(out + plane, total, mask=r < rows)
    tl.store(out + 2 * plane, picked * scale, mask=r < rows)
    if ENTROPY:
        tl.store(out + 3 * plane, weighted, mask=r < rows)
    extra = out + (3 + ENTROPY) * plane
    if MEAN:
        tl.store(extra, summed, mask=r < rows)
    if TOP1:
        tl.store(extra + MEAN * plane, peak, mask=r < rows)
        tl.store(extra + (MEAN + 1) * plane, best.to(tl.float32, bitcast=True), mask=r < rows)
    if SQUARES:
        tl.store(extra + (MEAN + 2 * TOP1) * plane, squares, mask=r < rows)


@triton.jit(do_not_specialize=["rows"])
def linear_merge_kernel(
    parts_ptr, targets_ptr, logp_ptr, entropy_ptr, lse_ptr, rows, vocab, ignore_index,
    SPLITS: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The splits' parts, merged in order; logp is 0 at ignored rows, NaN where the target is no column."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < rows
    plane = tl.cast(rows, tl.int64) * SPLITS
    peak = tl.full((BLOCK,), NEG_INF, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    picked = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        part = parts_ptr + tl.cast(rows, tl.int64) * split + r
        their_peak = tl.load(part, mask=inside, other=NEG_INF)
        their_total = tl.load(part + plane, mask=inside, other=0.0)
        picked += tl.load(part + 2 * plane, mask=inside, other=0.0)
        new = tl.maximum(peak, their_peak)
        base = tl.where(new == NEG_INF, 0.0, new)
        mine, theirs = tl.exp2(peak - base), tl.exp2(their_peak - base)
        if ENTROPY:
            their_weighted = tl.load(part + 3 * plane, mask=inside, other=0.0)
            weighted = mine * (weighted + total * tl.maximum(peak - base, FLOOR))
            weighted += theirs * (their_weighted + their_total * tl.maximum(their_peak - base, FLOOR))
        total = total * mine + their_total * theirs
        peak = new
    target = tl.load(targets_ptr + r, mask=inside, other=0)
    ignored = target == ignore_index
    log_total = log2(total)
    logp = (picked - peak - log_total) * LN2
    logp = tl.where((target >= 0) & (target < vocab), logp, float("nan"))
    tl.store(logp_ptr + r, tl.where(ignored, 0.0, logp), mask=inside)
    tl.store(lse_ptr + r, (peak + log_total) * LN2, mask=inside)
    if ENTROPY:
        entropy = (log_total - weighted / total) * LN2
        tl.store(entropy_ptr + r, tl.where(ignored, 0.0, entropy), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def linear_extras_kernel(
    parts_ptr, targets_ptr, mean_ptr, top1_ptr, squares_ptr, rows, vocab, temperature, ignore_index,
    SPLITS: tl.constexpr, ENTROPY: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr, SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the splits' parts hold beside log p, merged in order: mean z, whether the target is the arg max (of equals
    the first), log Σ p²; all 0 at ignored rows."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < rows
    plane = tl.cast(rows, tl.int64) * SPLITS
    peak = tl.full((BLOCK,), NEG_INF, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    highest = tl.full((BLOCK,), NEG_INF, tl.float32)
    best = tl.full((BLOCK,), -1, tl.int32)
    for split in range(SPLITS):
        part = parts_ptr + tl.cast(rows, tl.int64) * split + r
        extra = part + (3 + ENTROPY) * plane
        if MEAN:
            summed += tl.load(extra, mask=inside, other=0.0)
        if TOP1:
            theirs = tl.load(extra + MEAN * plane, mask=inside, other=NEG_INF)
            column = tl.load(extra + (MEAN + 1) * plane, mask=inside, other=0.0).to(tl.int32, bitcast=True)
            best = tl.where(theirs > highest, column, best)
            highest = tl.maximum(highest, theirs)
        if SQUARES:
            their_peak = tl.load(part, mask=inside, other=NEG_INF)
            new = tl.maximum(peak, their_peak)
            base = tl.where(new == NEG_INF, 0.0, new)
            mine, theirs = tl.exp2(peak - base), tl.exp2(their_peak - base)
            their_squares = tl.load(extra + (MEAN + 2 * TOP1) * plane, mask=inside, other=0.0)
            squares = squares * mine * mine + their_squares * theirs * theirs
            total = total * mine + tl.load(part + plane, mask=inside, other=0.0) * theirs
            peak = new
    target = tl.load(targets_ptr + r, mask=inside, other=0)
    counts = target != ignore_index
    if MEAN:
        tl.store(mean_ptr + r, tl.where(counts, summed / temperature / vocab, 0.0), mask=inside)
    if TOP1:
        tl.store(top1_ptr + r, (counts & (best == target)).to(tl.uint8), mask=inside)
    if SQUARES:
        logs = (log2(squares) - 2.0 * log2(total)) * LN2
        tl.store(squares_ptr + r, tl.where(counts, logs, 0.0), mask=inside)


class LinearLaunch:
    """How this problem's operands reach the kernels, and with which tiles."""

    def __init__(self, hidden: Tensor, head: Head):
        self.width, self.vocab = hidden.shape[1], head.weight.shape[0]
        self.descriptors, self.tiles = tiles_of(hidden, self.vocab)
        self.weight = self.rows(head.weight)
        # An absent bias is never read; the weight's pointer stands in.
        self.bias = self.weight if head.bias is None else head.bias.contiguous()
        self.flags = {
            "TMA": self.descriptors,
            "PRECISION": precision_of(hidden.dtype),
            "BIAS": head.bias is not None,
            "SOFTCAP": head.softcap > 0,
        }

    def rows(self, x: Tensor) -> Tensor:
        """x, or a copy where its rows are not runs of neighbours, or not aligned for the copy engine."""
        plain = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
        aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
        return x if plain and (aligned or not self.descriptors) else x.clone(memory_format=torch.contiguous_format)

    def operand(self, x: Tensor, block: list[int]):
        return TensorDescriptor.from_tensor(x, block) if self.descriptors else x


def tiles_of(hidden: Tensor, vocab: int) -> tuple[bool, tiles.Tiles]:
    """(whether operands are read through tensor descriptors, tiles); from shapes, dtype and device alone."""
    # Symbolic sizes become numbers: a choice of tiles holds for one width and one vocabulary.
    problem = tiles.problem_of(int(hidden.shape[1]), int(vocab), hidden.element_size(), hidden.device)
    return problem.descriptors, tiles.choose(problem, hidden.device)


def saved_shapes_triton(hidden: Tensor, head: Head, share: float = 1.0) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of `saved` and `shift`: rows of whole 16 bytes; a shift for each row and part of a column tile, of
    those that are not kept too, which spares the kernel the register that would tell them apart."""
    vocab = head.weight.shape[0]
    tile = tiles_of(hidden, vocab)[1].logits(head.bias is not None, head.softcap > 0, True)
    kept = kept_columns(vocab, share, tile.columns)
    return (hidden.shape[0], -(-kept // 8) * 8), (tile.parts * -(-vocab // tile.columns), hidden.shape[0])


def precision_of(dtype: torch.dtype) -> str:
    # TF32 alone would keep 10 bits of an fp32 operand; three TF32 products keep what fp32 does.
    return "tf32x3" if dtype == torch.float32 else "ieee"


def block_constants(tile: tiles.Tile) -> dict:
    return {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "PARTS": tile.parts, **tile.launch}


class Results(NamedTuple):
    """What a forward pass over N rows fills, and how."""

    logp: Tensor  # [N] fp32, as lse and, where it is wanted, entropy
    entropy: Tensor
    lse: Tensor
    saved: Tensor  # [N, kept columns of the vocabulary, to whole 16 bytes]
    shift: Tensor  # see `saved_shapes_triton`, or [N]: the caller's
    save: int  # SAVE of the kernels: 0 = nothing is kept, 1 = at a shift of the kernel's, 2 = at the caller's
    step: int  # rows of a launch

    def stats(self, found: Found) -> LinearStats:
        kept = self.saved if self.save else self.shift.to(self.saved.dtype)  # of nothing, two tensors
        return LinearStats(self.logp, self.entropy, self.lse, kept, self.shift, found)


def empty_results(
    hidden: Tensor, head: Head, want_entropy: bool, save_dtype: torch.dtype | None, save_share: float,
    row_shift: Tensor | None,
) -> Results:  # fmt: skip
    n, device, f32 = hidden.shape[0], hidden.device, torch.float32
    logp, lse = (torch.empty(n, dtype=f32, device=device) for _ in range(2))
    entropy = torch.empty(n if want_entropy else 0, dtype=f32, device=device)
    shape, shifts = saved_shapes_triton(hidden, head, save_share) if save_dtype else ((0, 8), 0)
    saved = torch.empty(shape, dtype=save_dtype or torch.bfloat16, device=device)
    shift = torch.empty(shifts, dtype=f32, device=device) if row_shift is None else row_shift
    save = 0 if save_dtype is None else 1 if row_shift is None else 2
    return Results(logp, entropy, lse, saved, shift, save, max(1, n) if save_dtype else FORWARD_TOKENS)


def linear_forward_triton(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    ignore_index: int,
    want_entropy: bool = False,
    save_dtype: torch.dtype | None = None,
    save_share: float = 1.0,
    row_shift: Tensor | None = None,
    extras: Extras = NO_EXTRAS,
) -> LinearStats:
    """hidden [N, H], targets [N] → the rows' statistics, fp32.

    `row_shift` [N] fp32, in base-2 units: what is kept is 2^(z·log₂e − row_shift), one shift a row.
    """
    n, vocab = hidden.shape[0], head.weight.shape[0]
    run = LinearLaunch(hidden, head)
    hidden, targets = run.rows(hidden), targets.contiguous()
    tile = run.tiles.logits(head.bias is not None, head.softcap > 0, save_dtype is not None)
    splits, per_split = tiles.splits_of(vocab, tile)
    to = empty_results(hidden, head, want_entropy, save_dtype, save_share, row_shift)
    mean, squares = (
        torch.empty(n if want else 0, dtype=torch.float32, device=hidden.device)
        for want in (extras.mean_logits, extras.log_sum_sq_probs)
    )
    top1 = torch.empty(n if extras.is_top1 else 0, dtype=torch.uint8, device=hidden.device)
    wanted = {"MEAN": extras.mean_logits, "TOP1": extras.is_top1, "SQUARES": extras.log_sum_sq_probs}
    columns = min(to.saved.shape[1], vocab)
    for n0 in range(0, n, to.step):
        h, t = hidden[n0 : n0 + to.step], targets[n0 : n0 + to.step]
        rows = h.shape[0]
        kept = to.saved[:, :columns]
        if save_dtype is not None:
            kept = run.operand(kept, [tile.rows, tile.part])
        planes = 3 + want_entropy + extras.mean_logits + 2 * extras.is_top1 + extras.log_sum_sq_probs
        parts = torch.empty((planes, splits, rows), dtype=torch.float32, device=hidden.device)
        with launching("linear_stats", hidden.device):
            on_grid(linear_stats_kernel, (triton.cdiv(rows, tile.rows) * splits,))(
                run.operand(h, [tile.rows, tile.depth]), run.operand(run.weight, [tile.columns, tile.depth]),
                run.bias, t, parts, kept, to.shift,
                rows, vocab, run.width, columns, h.stride(0), run.weight.stride(0), to.saved.stride(0),
                head.temperature, head.softcap,
                SPLITS=splits, PER_SPLIT=per_split, ENTROPY=want_entropy,
                SAVE=to.save, GROUP=GROUP, **wanted,
                **run.flags, **block_constants(tile),
            )  # fmt: skip
        with launching("linear_merge", hidden.device):
            on_grid(linear_merge_kernel, (triton.cdiv(rows, 128),))(
                parts, t, to.logp[n0:], to.entropy[n0:], to.lse[n0:], rows, vocab, ignore_index,
                SPLITS=splits, ENTROPY=want_entropy, BLOCK=128, num_warps=4, **tiles.FUSION,
            )  # fmt: skip
        if any(extras):
            with launching("linear_extras", hidden.device):
                on_grid(linear_extras_kernel, (triton.cdiv(rows, 128),))(
                    parts, t, mean[n0:], top1[n0:], squares[n0:], rows, vocab, head.temperature, ignore_index,
                    SPLITS=splits, ENTROPY=want_entropy, **wanted, BLOCK=128, num_warps=4, **tiles.FUSION,
                )  # fmt: skip
    return to.stats(Found(mean, top1.view(torch.bool), squares))
