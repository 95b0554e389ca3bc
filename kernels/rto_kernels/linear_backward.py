"""The Triton backward pass of linear_logprob.py and linear_ppo.py.

Rows with a gradient are gathered in front and counted on the device. Then, for each chunk of the vocabulary,

    dz [rows, chunk]   from logits computed again, or from kept probabilities
    d(hidden) += dz·W,   d(weight) = dzᵀ·hidden,   d(bias) = Σ dz

with fp32 accumulators and nothing added atomically.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from ._dispatch import launching, on_grid
from ._math import FLOOR, LN2, LOG2E, expm1
from ._vocab_torch import Head, LinearGrads, LinearStats
from .linear_forward import (
    GROUP,
    LinearLaunch,
    block_constants,
    dot,
    grouped_block,
    halves,
    store_block,
    tile_logits,
    tile_product,
)

BACKWARD_TOKENS = 8192  # rows a pass over the vocabulary takes at once
DLOGITS_BYTES = 1 << 28  # of dz held at once
TILES_EACH = 2  # column tiles that a program of linear_probabilities takes


@triton.jit
def _dlogits(log_p, p, slope, cols, active, target, g, missing, ge, entropy, ENTROPY: tl.constexpr):
    """dz·dz/da of these columns, from log₂ p and p; `missing` is g·(1 − p) of the target."""
    dz = tl.where(cols[None, :] == target[:, None], missing[:, None], p * -g[:, None])
    if ENTROPY:
        dz -= p * ge[:, None] * (tl.maximum(log_p, FLOOR) * LN2 + entropy[:, None])
    return tl.where(active[:, None], dz * slope, 0.0)


@triton.jit
def _load_rows(
    targets_ptr,
    logp_ptr,
    lse_ptr,
    entropy_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,
    at,
    active,
    vocab,
    ENTROPY: tl.constexpr,
):
    """What a gathered row brings: (target or −1, lse·log₂e, its gradient, that times 1 − p, the entropy's, entropy).

    1 − p comes from logp, which is exact near 0; z − lse is as far off as the rounding of two large numbers.
    """
    target = tl.load(targets_ptr + at, mask=active, other=-1)
    target = tl.where((target >= 0) & (target < vocab), target, -1).to(tl.int32)
    lse = tl.load(lse_ptr + at, mask=active, other=0.0) * LOG2E
    g = tl.load(grad_logp_ptr + at, mask=active, other=0.0)
    missing = -g * expm1(tl.load(logp_ptr + at, mask=active, other=0.0))
    ge, entropy = g, g
    if ENTROPY:
        ge = tl.load(grad_entropy_ptr + at, mask=active, other=0.0)
        entropy = tl.load(entropy_ptr + at, mask=active, other=0.0)
    return target, lse, g, missing, ge, entropy


@triton.jit(do_not_specialize=["start", "rows", "col_start", "columns"])
def linear_dlogits_kernel(
    h, w, bias_ptr, targets_ptr, logp_ptr, lse_ptr, entropy_ptr, grad_logp_ptr, grad_entropy_ptr, count_ptr, dz,
    start, rows, col_start, columns, vocab, width, stride_h, stride_w, stride_dz, temperature, softcap,
    ENTROPY: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """d(hidden·Wᵀ + bias) of [rows, chunk], rows in gathered order; a block past `count` is left alone."""
    row_block, column_block = grouped_block(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(columns, BN), GROUP)
    row0, col0 = row_block * BM, col_start + column_block * BN
    live = tl.load(count_ptr) - start
    if row0 >= live:
        return
    r = row0 + tl.arange(0, BM)
    active = (r < rows) & (r < live)
    # Loaded before the product: after it, ptxas (CUDA 12.8) waits for each step of the product by itself.
    target, lse, g, missing, ge, entropy = _load_rows(
        targets_ptr, logp_ptr, lse_ptr, entropy_ptr, grad_logp_ptr, grad_entropy_ptr, start + r, active, vocab, ENTROPY
    )
    acc = tile_product(h, w, row0, col0, rows, vocab, width, stride_h, stride_w, BM, BN, BK, TMA, PRECISION)
    PART: tl.constexpr = BN // PARTS
    if PARTS == 2:
        acc, right = halves(acc, BM, BN)
    cols = col0 + tl.arange(0, PART)
    scale = LOG2E / temperature
    z, slope = tile_logits(acc, cols, bias_ptr, vocab, temperature, softcap, BIAS, SOFTCAP)
    z = z * scale - lse[:, None]
    d = _dlogits(z, tl.exp2(z), slope, cols, active, target, g, missing, ge, entropy, ENTROPY)
    store_block(dz, d, row0, col0 - col_start, rows, columns, stride_dz, TMA)
    if PARTS == 2:
        cols += PART
        z, slope = tile_logits(right, cols, bias_ptr, vocab, temperature, softcap, BIAS, SOFTCAP)
        z = z * scale - lse[:, None]
        d = _dlogits(z, tl.exp2(z), slope, cols, active, target, g, missing, ge, entropy, ENTROPY)
        store_block(dz, d, row0, col0 - col_start + PART, rows, columns, stride_dz, TMA)


@triton.jit(do_not_specialize=["start", "rows", "col_start", "columns"])
def linear_probabilities_kernel(
    h, w, targets_ptr, logp_ptr, lse_ptr, count_ptr, out, start, rows, col_start, columns, vocab, width,
    stride_h, stride_w, stride_out, temperature, EACH: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """p of [rows, chunk], but p − 1 at the target: d(logits) without its factor a row, which is spared here.

    A program takes EACH column tiles: in a loop ptxas (CUDA 12.8) lets the product's steps overlap, without one it
    waits for each.
    """
    column_tiles = tl.cdiv(columns, BN)
    row_block, split = grouped_block(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(column_tiles, EACH), GROUP)
    row0 = row_block * BM
    live = tl.load(count_ptr) - start
    if row0 >= live:
        return
    r = row0 + tl.arange(0, BM)
    active = (r < rows) & (r < live)
    target = tl.load(targets_ptr + start + r, mask=active, other=-1).to(tl.int32)
    lse = tl.load(lse_ptr + start + r, mask=active, other=0.0) * LOG2E
    missing = expm1(tl.load(logp_ptr + start + r, mask=active, other=0.0))
    scale = LOG2E / temperature
    PART: tl.constexpr = BN // PARTS
    for tile in range(split * EACH, min((split + 1) * EACH, column_tiles)):
        col0 = col_start + tile * BN
        acc = tile_product(h, w, row0, col0, rows, vocab, width, stride_h, stride_w, BM, BN, BK, TMA, PRECISION)
        if PARTS == 2:
            acc, right = halves(acc, BM, BN)
        cols = col0 + tl.arange(0, PART)
        p = tl.where(cols[None, :] == target[:, None], missing[:, None], tl.exp2(acc * scale - lse[:, None]))
        store_block(out, p, row0, col0 - col_start, rows, columns, stride_out, TMA)
        if PARTS == 2:
            cols += PART
            p = tl.where(cols[None, :] == target[:, None], missing[:, None], tl.exp2(right * scale - lse[:, None]))
            store_block(out, p, row0, col0 - col_start + PART, rows, columns, stride_out, TMA)


@triton.jit(do_not_specialize=["start", "rows", "col_start", "columns", "saved_rows"])
def linear_dlogits_saved_kernel(
    saved_ptr, shift_ptr, order_ptr, targets_ptr, logp_ptr, lse_ptr, entropy_ptr, grad_logp_ptr, grad_entropy_ptr,
    count_ptr, dz, start, rows, col_start, columns, vocab, saved_rows, stride_saved, stride_dz,
    temperature, softcap,
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
        target, lse, g, missing, ge, entropy = _load_rows(
            targets_ptr,
            logp_ptr,
            lse_ptr,
            entropy_ptr,
            grad_logp_ptr,
            grad_entropy_ptr,
            start + r,
            active,
            vocab,
            ENTROPY,
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
        d = _dlogits(log_p, p, slope, cols, active, target, g, missing, ge, entropy, ENTROPY)
        store_block(dz, d, row0 + first, col0 - col_start, rows, columns, stride_dz, False)


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


@triton.jit(do_not_specialize=["start", "m", "k"])
def linear_product_kernel(
    a, b, c, count_ptr, start, m, n, k, stride_a, stride_b, stride_c,
    A_IS_KM: tl.constexpr, ACCUMULATE: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c [m, n] (+)= a·b, b [k, n], a stored [m, k], or [k, m] with A_IS_KM; the token dimension (k if
    A_IS_KM, else m) ends where `count` − start says."""
    row_block, column_block = grouped_block(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN), GROUP)
    row0, col0 = row_block * BM, column_block * BN
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
            acc = dot(left, b.load([k0, col0]), acc, PRECISION)
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
            acc = dot(left, right, acc, PRECISION)
    PART: tl.constexpr = BN // PARTS
    if PARTS == 2:
        acc, right = halves(acc, BM, BN)
    if ACCUMULATE:
        acc = _add(c, acc, row0, col0, m, n, stride_c, TMA)
    store_block(c, acc, row0, col0, m, n, stride_c, TMA)
    if PARTS == 2:
        if ACCUMULATE:
            right = _add(c, right, row0, col0 + PART, m, n, stride_c, TMA)
        store_block(c, right, row0, col0 + PART, m, n, stride_c, TMA)


@triton.jit(do_not_specialize=["start", "rows", "columns"])
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


def factors(hidden: Tensor, head: Head, entropy_gradient: bool) -> bool:
    """Whether d(logits) is a number a row times something that does not know the upstream gradient.

    Not under a soft-cap or with a gradient of the entropy. d(bias) would need the numbers in full precision, and fp16
    could not hold them. fp32 would gain nothing.
    """
    return hidden.dtype == torch.bfloat16 and head.bias is None and not head.softcap and not entropy_gradient


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
    order = torch.argsort((~active).view(torch.uint8), stable=True)  # a sort of bytes exists on every device
    count = active.sum(dtype=torch.int32)
    # Gathered rows without a gradient are emptied: they may hold NaN, and 0 · NaN would reach d(weight).
    live = torch.arange(n, device=device) < count
    h = hidden[order].masked_fill_(~live[:, None], 0)
    t, logp, lse, g, entropy, ge = (
        x if x is None or x.shape[0] != n else x[order] for x in (targets, stats.logp, stats.lse, g, stats.entropy, ge)
    )
    run = LinearLaunch(h, head)
    kept = min(stats.saved.shape[1], run.vocab) if stats.saved.numel() else 0  # columns whose exp(z) was kept
    # The factor a row leaves the [rows, columns] block: it scales hidden on one side, d(hidden) on the other.
    factored = not kept and factors(hidden, head, ge is not None)
    special = head.bias is not None or head.softcap > 0
    tile = run.tiles.saving if factored or (kept and not special) else run.tiles.full
    product = run.tiles.product
    factor = g * (-1.0 / head.temperature)
    left = (h * factor[:, None]).to(h.dtype) if factored else h
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
        hc, lc = h[n0 : n0 + BACKWARD_TOKENS], left[n0 : n0 + BACKWARD_TOKENS]
        rows = hc.shape[0]
        chunk = max(1, DLOGITS_BYTES // (rows * hidden.element_size() * tile.columns)) * tile.columns
        dz = torch.empty((rows, min(chunk, -(-run.vocab // 128) * 128)), dtype=hidden.dtype, device=device)
        dh = torch.zeros((rows, width), dtype=f32, device=device) if need_hidden else None
        accumulate = into is not None or n0 > 0
        starts = [*range(0, kept, chunk), *range(kept, run.vocab, chunk)]
        for v0, end in pairwise([*starts, run.vocab]):
            columns = end - v0
            w = run.weight[v0:end]
            dz_part = dz[:, :columns]
            if v0 < kept:
                part = tile.part
                with launching("linear_dlogits_saved", device):
                    on_grid(linear_dlogits_saved_kernel, (triton.cdiv(rows, tile.rows), triton.cdiv(columns, part)))(
                        stats.saved, stats.shift, order, t, logp, lse, entropy, g, g if ge is None else ge, count,
                        dz, n0, rows, v0, columns, kept, n, stats.saved.stride(0), dz.stride(0),
                        head.temperature, head.softcap,
                        ENTROPY=ge is not None, SOFTCAP=head.softcap > 0, BM=tile.rows, WIDTH=part,
                        ROWS=min(16, tile.rows),
                        num_warps=4, **tiles.FUSION,
                    )  # fmt: skip
            elif factored:
                with launching("linear_probabilities", device):
                    splits = triton.cdiv(columns, TILES_EACH * tile.columns)
                    on_grid(linear_probabilities_kernel, (triton.cdiv(rows, tile.rows) * splits,))(
                        run.operand(hc, [tile.rows, tile.depth]),
                        run.operand(run.weight, [tile.columns, tile.depth]),
                        t, logp, lse, count, run.operand(dz_part, [tile.rows, tile.part]),
                        n0, rows, v0, columns, run.vocab, width,
                        hc.stride(0), run.weight.stride(0), dz.stride(0), head.temperature,
                        EACH=TILES_EACH, GROUP=GROUP, TMA=run.descriptors, PRECISION=run.flags["PRECISION"],
                        **block_constants(tile),
                    )  # fmt: skip
            else:
                with launching("linear_dlogits", device):
                    blocks = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
                    on_grid(linear_dlogits_kernel, (blocks,))(
                        run.operand(hc, [tile.rows, tile.depth]),
                        run.operand(run.weight, [tile.columns, tile.depth]),
                        run.bias, t, logp, lse, entropy, g, g if ge is None else ge, count,
                        run.operand(dz_part, [tile.rows, tile.part]),
                        n0, rows, v0, columns, run.vocab, width,
                        hc.stride(0), run.weight.stride(0), dz.stride(0),
                        head.temperature, head.softcap, ENTROPY=ge is not None, GROUP=GROUP,
                        **run.flags, **block_constants(tile),
                    )  # fmt: skip
            if need_bias:
                with launching("linear_bias", device):
                    on_grid(linear_bias_kernel, (triton.cdiv(columns, 128),))(
                        dz, d_bias[v0:], count, n0, rows, columns, dz.stride(0),
                        ACCUMULATE=accumulate, BM=16, BN=128, num_warps=4, **tiles.FUSION,
                    )  # fmt: skip
            if need_weight:
                _product(run, product, dz_part, lc, d_weight[v0:end], count, n0, True, accumulate)
            if need_hidden:
                _product(run, product, dz_part, w, dh, count, n0, False, True)
        if need_hidden:
            d_hidden[order[n0 : n0 + rows]] = dh * factor[n0 : n0 + rows, None] if factored else dh
    return LinearGrads(d_hidden, d_weight, d_bias)


def _product(run: LinearLaunch, tile: tiles.Tile, a, b, c, count, start, a_is_km, accumulate) -> None:
    """c (+)= a·b, or aᵀ·b with a_is_km."""
    m, k = (a.shape[1], a.shape[0]) if a_is_km else a.shape
    n = b.shape[1]
    a_block = [tile.depth, tile.rows] if a_is_km else [tile.rows, tile.depth]
    with launching("linear_product", c.device):
        on_grid(linear_product_kernel, (triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),))(
            run.operand(a, a_block), run.operand(b, [tile.depth, tile.columns]),
            run.operand(c, [tile.rows, tile.part]), count, start,
            m, n, k, a.stride(0), b.stride(0), c.stride(0),
            A_IS_KM=a_is_km, ACCUMULATE=accumulate, GROUP=GROUP,
            TMA=run.descriptors, PRECISION=run.flags["PRECISION"], **block_constants(tile),
        )  # fmt: skip
