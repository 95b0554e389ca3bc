"""The Triton kernels behind linear_logprob.py and linear_ppo.py, and their launchers.

    forward    a program takes a block of rows through one split of the vocabulary, tile by tile, with the running
               (max, Σ exp, Σ exp·z, target logit) in registers; the splits are then merged in order
    backward   rows with a gradient are gathered in front; for each vocabulary chunk
               dz [rows, chunk] is formed from recomputed or kept logits, then d(hidden) += dz·W, d(weight) = dzᵀ·hidden

Logits exist in fp32 registers, in base-2 units (z·log₂e), and never in memory. Nothing is added atomically.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles
from ._chunked import Head, LinearGrads, LinearStats
from ._dispatch import INTERPRET, count_launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
FLOOR = tl.constexpr(-1.0e5)
# The interpreter keeps bf16 as its bits and would multiply those; there the operands are widened first.
WIDEN = tl.constexpr(INTERPRET)
GROUP = 16  # row blocks that walk the same vocabulary splits together, for the L2 cache
FORWARD_TOKENS = 32768  # per launch, which bounds the partial results
BACKWARD_TOKENS = 8192
DLOGITS_BYTES = 1 << 28
SAVED_ELEMENTS = 1 << 29  # of exp(z) that fused_linear_ppo_loss keeps at once


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tanh(x):
    # Near 0 a polynomial (a fit of (tanh x − x)/x³ in x², below 1 ulp), else (1 − t)/(1 + t) with t = exp(−2|x|).
    square = x * x
    fit = -0.00627639 * square + 0.02111622
    fit = fit * square - 0.05387514
    fit = fit * square + 0.13332924
    fit = fit * square - 0.3333333
    near = x + x * square * fit
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - t) / (1.0 + t)
    return tl.where(tl.abs(x) < 0.6, near, tl.where(x < 0, -far, far))


@triton.jit
def _tile_product(
    h, w, row0, col0, rows, vocab, width, stride_h, stride_w,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden·Wᵀ [BM, BN] of the rows from row0 and the vocabulary from col0, fp32."""
    acc = tl.zeros((BM, BN), tl.float32)
    if TMA:
        for k in range(0, width, BK):
            acc = _dot(h.load([row0, k]), w.load([col0, k]).T, acc, PRECISION)
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
            acc = _dot(a, b.T, acc, PRECISION)
    return acc


@triton.jit
def _store(c, x, row0, col0, rows, columns, stride, TMA: tl.constexpr):
    """x to c [rows, columns] at (row0, col0), in c's dtype; what is outside is left out."""
    if TMA:
        c.store([row0, col0], x.to(c.dtype))
    else:
        r = row0 + tl.arange(0, x.shape[0])
        cols = col0 + tl.arange(0, x.shape[1])
        at = c + r[:, None].to(tl.int64) * stride + cols[None, :]
        tl.store(at, x.to(c.dtype.element_ty), mask=(r < rows)[:, None] & (cols < columns)[None, :])


@triton.jit
def _halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """The left and right half of x [BM, BN]. What follows a product works on halves, or it would not fit in registers."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _logits(acc, cols, bias_ptr, vocab, temperature, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """(z·log₂e, −inf past the vocabulary; dz/da: a matrix under the soft-cap, else a number)."""
    if BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < vocab, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        bent = tanh(acc / softcap)
        z = bent * (softcap * LOG2E / temperature)
        slope = (1.0 - bent * bent) / temperature
    else:
        z = acc * (LOG2E / temperature)
        slope = 1.0 / temperature
    return tl.where((cols < vocab)[None, :], z, NEG_INF), slope


@triton.jit
def _absorb(
    acc, row0, col0, target, peak, total, weighted, picked, bias_ptr, saved, shift_ptr,
    rows, vocab, stride_saved, temperature, softcap,
    ENTROPY: tl.constexpr, SAVE: tl.constexpr, TMA: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The running (max, Σ 2^(z − max), Σ 2^(z − max)·(z − max), target logit) after the columns of acc."""
    WIDTH: tl.constexpr = acc.shape[1]
    cols = col0 + tl.arange(0, WIDTH)
    z, _ = _logits(acc, cols, bias_ptr, vocab, temperature, softcap, BIAS, SOFTCAP)
    picked += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)
    new = tl.maximum(peak, tl.max(z, 1))
    base = tl.where(new == NEG_INF, 0.0, new)  # a row of −inf alone must not give NaN here
    z -= base[:, None]
    e = tl.exp2(z)
    decay = tl.exp2(peak - base)
    if ENTROPY:
        weighted = decay * (weighted + total * tl.maximum(peak - base, FLOOR))
        weighted += tl.sum(e * tl.maximum(z, FLOOR), 1)
    total = total * decay + tl.sum(e, 1)
    if SAVE:
        # A whole power of two as shift: what scales by it later is exact.
        k = tl.ceil(base)
        kept = (e * tl.exp2(base - k)[:, None]).to(tl.bfloat16)
        _store(saved, kept, row0, col0, rows, vocab, stride_saved, TMA)
        r = row0 + tl.arange(0, acc.shape[0])
        tl.store(shift_ptr + tl.cast(col0 // WIDTH, tl.int64) * rows + r, k, mask=r < rows)
    return new, total, weighted, picked


@triton.jit
def linear_stats_kernel(
    h, w, bias_ptr, targets_ptr, parts_ptr, saved, shift_ptr,
    rows, vocab, width, stride_h, stride_w, stride_saved, temperature, softcap,
    SPLITS: tl.constexpr, PER_SPLIT: tl.constexpr, ENTROPY: tl.constexpr, SAVE: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """parts [3 or 4, SPLITS, rows]: max, Σ 2^(z − max), target logit (, Σ 2^(z − max)·(z − max)) of each split."""
    pid = tl.program_id(0)
    first_block = pid // (GROUP * SPLITS) * GROUP
    group = min(tl.cdiv(rows, BM) - first_block, GROUP)
    local = pid % (GROUP * SPLITS)
    row0 = (first_block + local % group) * BM
    split = local // group
    r = row0 + tl.arange(0, BM)
    target = tl.load(targets_ptr + r, mask=r < rows, other=-1)
    target = tl.where((target >= 0) & (target < vocab), target, -1).to(tl.int32)
    peak = tl.full((BM,), NEG_INF, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    weighted = tl.zeros((BM,), tl.float32)
    picked = tl.zeros((BM,), tl.float32)
    tiles_end = min((split + 1) * PER_SPLIT, tl.cdiv(vocab, BN))
    PART: tl.constexpr = BN // PARTS
    for tile in range(split * PER_SPLIT, tiles_end):
        col0 = tile * BN
        acc = _tile_product(
            h, w, row0, col0, rows, vocab, width, stride_h, stride_w, BM, BN, BK, TMA, PRECISION
        )
        if PARTS == 2:
            acc, right = _halves(acc, BM, BN)
        peak, total, weighted, picked = _absorb(
            acc, row0, col0, target, peak, total, weighted, picked, bias_ptr, saved, shift_ptr,
            rows, vocab, stride_saved, temperature, softcap, ENTROPY, SAVE, TMA, BIAS, SOFTCAP,
        )  # fmt: skip
        if PARTS == 2:
            peak, total, weighted, picked = _absorb(
                right, row0, col0 + PART, target, peak, total, weighted, picked, bias_ptr, saved, shift_ptr,
                rows, vocab, stride_saved, temperature, softcap, ENTROPY, SAVE, TMA, BIAS, SOFTCAP,
            )  # fmt: skip
    out = parts_ptr + tl.cast(split, tl.int64) * rows + r
    plane = tl.cast(rows, tl.int64) * SPLITS
    tl.store(out, peak, mask=r < rows)
    tl.store(out + plane, total, mask=r < rows)
    tl.store(out + 2 * plane, picked, mask=r < rows)
    if ENTROPY:
        tl.store(out + 3 * plane, weighted, mask=r < rows)


@triton.jit
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
    logp = (picked - peak - tl.log2(total)) * LN2
    logp = tl.where((target >= 0) & (target < vocab), logp, float("nan"))
    tl.store(logp_ptr + r, tl.where(ignored, 0.0, logp), mask=inside)
    tl.store(lse_ptr + r, (peak + tl.log2(total)) * LN2, mask=inside)
    if ENTROPY:
        entropy = (tl.log2(total) - weighted / total) * LN2
        tl.store(entropy_ptr + r, tl.where(ignored, 0.0, entropy), mask=inside)


@triton.jit
def _dlogits(log_p, p, slope, cols, active, target, g, ge, entropy, ENTROPY: tl.constexpr):
    """dz·dz/da of these columns, from log₂ p and p."""
    coefficient = -g[:, None]
    if ENTROPY:
        coefficient -= ge[:, None] * (tl.maximum(log_p, FLOOR) * LN2 + entropy[:, None])
    dz = p * coefficient + tl.where(cols[None, :] == target[:, None], g[:, None], 0.0)
    return tl.where(active[:, None], dz * slope, 0.0)


@triton.jit
def _load_rows(
    targets_ptr, lse_ptr, entropy_ptr, grad_logp_ptr, grad_entropy_ptr, at, active, vocab, ENTROPY: tl.constexpr
):
    """What a gathered row brings: (target or −1, lse·log₂e, its gradient, the entropy's, entropy)."""
    target = tl.load(targets_ptr + at, mask=active, other=-1)
    target = tl.where((target >= 0) & (target < vocab), target, -1).to(tl.int32)
    lse = tl.load(lse_ptr + at, mask=active, other=0.0) * LOG2E
    g = tl.load(grad_logp_ptr + at, mask=active, other=0.0)
    ge, entropy = g, g
    if ENTROPY:
        ge = tl.load(grad_entropy_ptr + at, mask=active, other=0.0)
        entropy = tl.load(entropy_ptr + at, mask=active, other=0.0)
    return target, lse, g, ge, entropy


@triton.jit
def linear_dlogits_kernel(
    h, w, bias_ptr, targets_ptr, lse_ptr, entropy_ptr, grad_logp_ptr, grad_entropy_ptr, count_ptr, dz,
    start, rows, col_start, columns, vocab, width, stride_h, stride_w, stride_dz, temperature, softcap,
    ENTROPY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """d(hidden·Wᵀ + bias) of a [rows, chunk] block, rows in gathered order; a block past `count` is left alone."""
    row0 = tl.program_id(0) * BM
    live = tl.load(count_ptr) - start
    if row0 >= live:
        return
    r = row0 + tl.arange(0, BM)
    active = (r < rows) & (r < live)
    col0 = col_start + tl.program_id(1) * BN
    acc = _tile_product(h, w, row0, col0, rows, vocab, width, stride_h, stride_w, BM, BN, BK, TMA, PRECISION)
    target, lse, g, ge, entropy = _load_rows(
        targets_ptr, lse_ptr, entropy_ptr, grad_logp_ptr, grad_entropy_ptr, start + r, active, vocab, ENTROPY
    )
    PART: tl.constexpr = BN // PARTS
    if PARTS == 2:
        acc, right = _halves(acc, BM, BN)
    cols = col0 + tl.arange(0, PART)
    z, slope = _logits(acc, cols, bias_ptr, vocab, temperature, softcap, BIAS, SOFTCAP)
    z -= lse[:, None]
    d = _dlogits(z, tl.exp2(z), slope, cols, active, target, g, ge, entropy, ENTROPY)
    _store(dz, d, row0, col0 - col_start, rows, columns, stride_dz, TMA)
    if PARTS == 2:
        cols += PART
        z, slope = _logits(right, cols, bias_ptr, vocab, temperature, softcap, BIAS, SOFTCAP)
        z -= lse[:, None]
        d = _dlogits(z, tl.exp2(z), slope, cols, active, target, g, ge, entropy, ENTROPY)
        _store(dz, d, row0, col0 - col_start + PART, rows, columns, stride_dz, TMA)


@triton.jit
def linear_dlogits_saved_kernel(
    saved_ptr, shift_ptr, order_ptr, targets_ptr, lse_ptr, entropy_ptr, grad_logp_ptr, grad_entropy_ptr, count_ptr,
    dz, start, rows, col_start, columns, vocab, saved_rows, stride_saved, stride_dz, temperature, softcap,
    ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The same from kept probabilities: BM rows by ROWS at a time, the WIDTH columns that share a shift."""
    live = tl.load(count_ptr) - start
    row0 = tl.program_id(0) * BM
    if row0 >= live:
        return
    col0 = col_start + tl.program_id(1) * WIDTH
    cols = col0 + tl.arange(0, WIDTH)
    shifts = shift_ptr + tl.cast(col0 // WIDTH, tl.int64) * saved_rows
    for first in range(0, BM, ROWS):
        r = row0 + first + tl.arange(0, ROWS)
        active = (r < rows) & (r < live)
        target, lse, g, ge, entropy = _load_rows(
            targets_ptr, lse_ptr, entropy_ptr, grad_logp_ptr, grad_entropy_ptr, start + r, active, vocab, ENTROPY
        )
        row = tl.load(order_ptr + start + r, mask=active, other=0)
        at = saved_ptr + row[:, None] * stride_saved + cols[None, :]
        kept = tl.load(at, mask=active[:, None] & (cols < vocab)[None, :], other=0.0).to(tl.float32)
        shift = tl.load(shifts + row, mask=active, other=0.0) - lse
        log_p = tl.maximum(tl.log2(kept), FLOOR) + shift[:, None]
        slope = 1.0 / temperature
        if SOFTCAP:
            bent = (log_p + lse[:, None]) * (temperature / (softcap * LOG2E))
            slope = tl.maximum(1.0 - bent * bent, 0.0) / temperature
        p = kept * tl.exp2(shift)[:, None]
        d = _dlogits(log_p, p, slope, cols, active, target, g, ge, entropy, ENTROPY)
        _store(dz, d, row0 + first, col0 - col_start, rows, columns, stride_dz, False)


@triton.jit
def _add(c, x, row0, col0, rows, columns, stride, TMA: tl.constexpr):
    """x + c at (row0, col0), fp32."""
    if TMA:
        there = c.load([row0, col0])
    else:
        r = row0 + tl.arange(0, x.shape[0])
        cols = col0 + tl.arange(0, x.shape[1])
        at = c + r[:, None].to(tl.int64) * stride + cols[None, :]
        there = tl.load(at, mask=(r < rows)[:, None] & (cols < columns)[None, :], other=0.0)
    return x + there.to(tl.float32)


@triton.jit
def linear_product_kernel(
    a, b, c, count_ptr, start, m, n, k, stride_a, stride_b, stride_c,
    A_IS_KM: tl.constexpr, ACCUMULATE: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c [m, n] (+)= a·b, b [k, n], a stored [m, k], or [k, m] with A_IS_KM; the token dimension (k if A_IS_KM,
    else m) ends where `count` − start says."""
    pid = tl.program_id(0)
    columns = tl.cdiv(n, BN)
    first_block = pid // (GROUP * columns) * GROUP
    group = min(tl.cdiv(m, BM) - first_block, GROUP)
    local = pid % (GROUP * columns)
    row0 = (first_block + local % group) * BM
    col0 = local // group * BN
    live = tl.load(count_ptr) - start
    if A_IS_KM:
        k = max(min(k, live), 0)
        if ACCUMULATE and k == 0:
            return
    elif row0 >= live:
        return
    r = row0 + tl.arange(0, BM)
    cols = col0 + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if TMA:
        for k0 in range(0, k, BK):
            left = a.load([k0, row0]).T if A_IS_KM else a.load([row0, k0])
            acc = _dot(left, b.load([k0, col0]), acc, PRECISION)
    else:
        kk = tl.arange(0, BK)
        for k0 in range(0, k, BK):
            inner = (k0 + kk).to(tl.int64)
            right = tl.load(
                b + inner[:, None] * stride_b + cols[None, :],
                mask=(inner < k)[:, None] & (cols < n)[None, :], other=0.0,
            )  # fmt: skip
            if A_IS_KM:
                at, mask = inner[:, None] * stride_a + r[None, :], (inner < k)[:, None] & (r < m)[None, :]
                left = tl.load(a + at, mask=mask, other=0.0).T
            else:
                at = r[:, None].to(tl.int64) * stride_a + inner[None, :]
                left = tl.load(a + at, mask=(r < m)[:, None] & (inner < k)[None, :], other=0.0)
            acc = _dot(left, right, acc, PRECISION)
    PART: tl.constexpr = BN // PARTS
    if PARTS == 2:
        acc, right = _halves(acc, BM, BN)
    if ACCUMULATE:
        acc = _add(c, acc, row0, col0, m, n, stride_c, TMA)
    _store(c, acc, row0, col0, m, n, stride_c, TMA)
    if PARTS == 2:
        if ACCUMULATE:
            right = _add(c, right, row0, col0 + PART, m, n, stride_c, TMA)
        _store(c, right, row0, col0 + PART, m, n, stride_c, TMA)


@triton.jit
def linear_bias_kernel(
    dz_ptr, out_ptr, count_ptr, start, rows, columns, stride_dz,
    ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [columns] (+)= Σ over rows of dz, rows in order."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    live = min(tl.load(count_ptr) - start, rows)
    acc = tl.zeros((BM, BN), tl.float32)
    for row0 in range(0, live, BM):
        r = row0 + tl.arange(0, BM)
        at = dz_ptr + r[:, None].to(tl.int64) * stride_dz + cols[None, :]
        acc += tl.load(at, mask=(r < live)[:, None] & (cols < columns)[None, :], other=0.0).to(tl.float32)
    total = tl.sum(acc, 0)
    if ACCUMULATE:
        total += tl.load(out_ptr + cols, mask=cols < columns, other=0.0)
    tl.store(out_ptr + cols, total.to(out_ptr.dtype.element_ty), mask=cols < columns)


class _Launch:
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
        """x, or a copy where its rows are not runs of neighbours, or not aligned as the copy engine wants them."""
        plain = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
        aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
        return x if plain and (aligned or not self.descriptors) else x.clone(memory_format=torch.contiguous_format)

    def operand(self, x: Tensor, block: list[int]):
        return TensorDescriptor.from_tensor(x, block) if self.descriptors else x


def tiles_of(hidden: Tensor, vocab: int) -> tuple[bool, tiles.Tiles]:
    """(whether operands are read through tensor descriptors, tiles); from shapes, dtype and device alone."""
    chip, size = tiles.chip_of(hidden.device), hidden.element_size()
    # The copy engine wants rows of whole 16 bytes; sm_80 has none.
    descriptors = chip != "sm80" and hidden.shape[1] * size % 16 == 0
    return descriptors, tiles.choose(hidden.shape[1], vocab, size, chip, descriptors)


def saved_shapes_triton(hidden: Tensor, vocab: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of `saved` and `shift`: a shift for each row and part of a column tile."""
    full = tiles_of(hidden, vocab)[1].full
    # A shift for each part of a tile; rows of whole 16 bytes.
    return (hidden.shape[0], -(-vocab // 8) * 8), (full.parts * -(-vocab // full.columns), hidden.shape[0])


def precision_of(dtype: torch.dtype) -> str:
    # TF32 alone would keep 10 bits of an fp32 operand; three TF32 products keep what fp32 does.
    return "tf32x3" if dtype == torch.float32 else "ieee"


def _blocks(tile: tiles.Tile) -> dict:
    return {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "PARTS": tile.parts, **tile.launch}


def linear_forward_triton(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    ignore_index: int,
    want_entropy: bool = False,
    save_dtype: torch.dtype | None = None,
) -> LinearStats:
    """hidden [N, H], targets [N] → the rows' statistics, fp32."""
    n, vocab = hidden.shape[0], head.weight.shape[0]
    run = _Launch(hidden, head)
    hidden, targets = run.rows(hidden), targets.contiguous()
    tile = run.tiles.logits(head.bias is not None, head.softcap > 0, save_dtype is not None)
    splits, per_split = tiles.splits_of(vocab, tile)
    logp, lse = (torch.empty(n, dtype=torch.float32, device=hidden.device) for _ in range(2))
    entropy = torch.empty(n if want_entropy else 0, dtype=torch.float32, device=hidden.device)
    shape, shifts = saved_shapes_triton(hidden, vocab) if save_dtype else ((0, 8), 0)
    saved = torch.empty(shape, dtype=torch.bfloat16, device=hidden.device)
    shift = torch.empty(shifts, dtype=torch.float32, device=hidden.device)
    step = n if save_dtype else FORWARD_TOKENS
    for n0 in range(0, n, max(step, 1)):
        h, t = hidden[n0 : n0 + step], targets[n0 : n0 + step]
        rows = h.shape[0]
        kept = saved[:, :vocab]
        if save_dtype is not None:
            kept = run.operand(kept, [tile.rows, tile.part])
        parts = torch.empty((3 + want_entropy, splits, rows), dtype=torch.float32, device=hidden.device)
        count_launch("linear_stats")
        linear_stats_kernel[(triton.cdiv(rows, tile.rows) * splits,)](
            run.operand(h, [tile.rows, tile.depth]), run.operand(run.weight, [tile.columns, tile.depth]),
            run.bias, t, parts, kept, shift,
            rows, vocab, run.width, h.stride(0), run.weight.stride(0), saved.stride(0), head.temperature, head.softcap,
            SPLITS=splits, PER_SPLIT=per_split, ENTROPY=want_entropy, SAVE=save_dtype is not None, GROUP=GROUP,
            **run.flags, **_blocks(tile),
        )  # fmt: skip
        count_launch("linear_merge")
        linear_merge_kernel[(triton.cdiv(rows, 128),)](
            parts, t, logp[n0:], entropy[n0:], lse[n0:], rows, vocab, ignore_index,
            SPLITS=splits, ENTROPY=want_entropy, BLOCK=128, num_warps=4, **tiles.FUSION,
        )  # fmt: skip
    return LinearStats(logp, entropy, lse, saved if save_dtype else shift.to(saved.dtype), shift)


def linear_backward_triton(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    stats: LinearStats,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    needs: Sequence[bool],
    into: LinearGrads | None = None,
) -> LinearGrads:
    """As `linear_backward`, with rows gathered and counted on the device: the host never waits."""
    need_hidden, need_weight, need_bias = needs
    (n, width), weight = hidden.shape, head.weight
    device, f32 = hidden.device, torch.float32
    g, ge = (None if x is None else x.to(f32) for x in (grad_logp, grad_entropy))
    if g is None:
        g = torch.zeros_like(ge)
    active = g != 0 if ge is None else (g != 0) | (ge != 0)
    order = torch.argsort(~active, stable=True)
    count = active.sum(dtype=torch.int32)
    # Gathered rows without a gradient are emptied: they may hold NaN, and 0 · NaN would reach d(weight).
    live = torch.arange(n, device=device) < count
    h = hidden[order].masked_fill_(~live[:, None], 0)
    t, lse, g, entropy, ge = (
        x if x is None or x.shape[0] != n else x[order] for x in (targets, stats.lse, g, stats.entropy, ge)
    )
    use_saved = stats.saved.numel() > 0
    run = _Launch(h, head)
    tile, product = run.tiles.logits(head.bias is not None, head.softcap > 0), run.tiles.product
    wide = n > BACKWARD_TOKENS  # several token blocks add up in fp32
    if into is not None:
        d_weight, d_bias = into.weight, into.bias
    else:
        d_weight = weight.new_empty(weight.shape, dtype=f32 if wide else weight.dtype) if need_weight else None
        d_bias = weight.new_empty(weight.shape[0], dtype=f32) if need_bias else None
    d_hidden = torch.empty((n, width), dtype=f32, device=device) if need_hidden else None
    if n == 0 and into is None:
        for x in (d_weight, d_bias):
            if x is not None:
                x.zero_()
    for n0 in range(0, n, BACKWARD_TOKENS):
        hc = h[n0 : n0 + BACKWARD_TOKENS]
        rows = hc.shape[0]
        chunk = max(1, DLOGITS_BYTES // (rows * hidden.element_size() * tile.columns)) * tile.columns
        dz = torch.empty((rows, min(chunk, -(-run.vocab // 128) * 128)), dtype=hidden.dtype, device=device)
        dh = torch.zeros((rows, width), dtype=f32, device=device) if need_hidden else None
        accumulate = into is not None or n0 > 0
        for v0 in range(0, run.vocab, chunk):
            columns = min(chunk, run.vocab - v0)
            w = run.weight[v0 : v0 + columns]
            dz_part = dz[:, :columns]
            if use_saved:
                part = run.tiles.full.part
                count_launch("linear_dlogits_saved")
                linear_dlogits_saved_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(columns, part))](
                    stats.saved, stats.shift, order, t, lse, entropy, g, g if ge is None else ge, count,
                    dz, n0, rows, v0, columns, run.vocab, n, stats.saved.stride(0), dz.stride(0),
                    head.temperature, head.softcap,
                    ENTROPY=ge is not None, SOFTCAP=head.softcap > 0, BM=tile.rows, WIDTH=part, ROWS=min(16, tile.rows),
                    num_warps=4, **tiles.FUSION,
                )  # fmt: skip
            else:
                count_launch("linear_dlogits")
                linear_dlogits_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns))](
                    run.operand(hc, [tile.rows, tile.depth]), run.operand(run.weight, [tile.columns, tile.depth]),
                    run.bias, t, lse, entropy, g, g if ge is None else ge, count,
                    run.operand(dz_part, [tile.rows, tile.part]),
                    n0, rows, v0, columns, run.vocab, width, hc.stride(0), run.weight.stride(0), dz.stride(0),
                    head.temperature, head.softcap, ENTROPY=ge is not None, **run.flags, **_blocks(tile),
                )  # fmt: skip
            if need_bias:
                count_launch("linear_bias")
                linear_bias_kernel[(triton.cdiv(columns, 128),)](
                    dz, d_bias[v0:], count, n0, rows, columns, dz.stride(0),
                    ACCUMULATE=accumulate, BM=32, BN=128, num_warps=4, **tiles.FUSION,
                )  # fmt: skip
            if need_weight:
                _product(run, product, dz_part, hc, d_weight[v0 : v0 + columns], count, n0, True, accumulate)
            if need_hidden:
                _product(run, product, dz_part, w, dh, count, n0, False, True)
        if need_hidden:
            d_hidden[order[n0 : n0 + rows]] = dh
    return LinearGrads(d_hidden, d_weight, d_bias)


def _product(run: _Launch, tile: tiles.Tile, a, b, c, count, start, a_is_km, accumulate) -> None:
    """c (+)= a·b, or aᵀ·b with a_is_km."""
    m, k = (a.shape[1], a.shape[0]) if a_is_km else a.shape
    n = b.shape[1]
    a_block = [tile.depth, tile.rows] if a_is_km else [tile.rows, tile.depth]
    count_launch("linear_product")
    linear_product_kernel[(triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),)](
        run.operand(a, a_block), run.operand(b, [tile.depth, tile.columns]),
        run.operand(c, [tile.rows, tile.part]), count, start,
        m, n, k, a.stride(0), b.stride(0), c.stride(0),
        A_IS_KM=a_is_km, ACCUMULATE=accumulate, GROUP=GROUP,
        TMA=run.descriptors, PRECISION=run.flags["PRECISION"], **_blocks(tile),
    )  # fmt: skip
