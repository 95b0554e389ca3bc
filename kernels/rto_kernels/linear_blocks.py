"""The forward pass of linear_logprob.py on chips that no tile was chosen for: the vendor's product, block by block.

    z[block] = hidden[block of rows] · weight[block of columns]ᵀ     cuBLAS, 16-bit operands, fp32 result
    parts    (max, Σ exp, Σ exp·z, target logit) of each row in each span of the block, which linear_forward.py merges

A block is BLOCK_ROWS × BLOCK_COLUMNS, 32 MB, so that a large L2 cache still holds the logits when the second kernel
reads them. There is nothing to tune, and no matrix of [N, V]. What is kept for the backward pass has the layout of
linear_forward.py's, and so do the results.

The vendor picks its kernel by the number of rows: a row's bits may depend on its batch. Under deterministic="batch",
for fp32 (whose products cuBLAS may round to TF32), where `extras` are asked for and once the tuner has measured tiles,
linear_forward.py's own pass runs.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from ._dispatch import INTERPRET, launching
from ._math import FLOOR, LOG2E, NEG_INF
from ._vocab_torch import NO_EXTRAS, Extras, Found, Head, LinearStats, product
from .linear_forward import (
    HIGHEST,
    LinearLaunch,
    empty_results,
    linear_forward_triton,
    linear_merge_kernel,
    tile_logits,
)

BLOCK_ROWS, BLOCK_COLUMNS = (32, 128) if INTERPRET else (1024, 8192)
SPAN = 64 if INTERPRET else 2048  # columns of a program, which divide a block's
ROWS, WIDTH = (8, 32) if INTERPRET else (8, 256)  # of a step
# A100, H100/H200, B200, B300. Others would run A100's tiles, which nobody has measured there.
WITH_TILES = ((8, 0), (9, 0), (10, 0), (10, 3))

_forced: ContextVar[bool] = ContextVar("forced", default=False)


@contextmanager
def forced() -> Iterator[None]:
    """Inside, every forward pass that may take blocks takes them, whatever the chip and the dtype."""
    token = _forced.set(True)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def _has_tiles(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in WITH_TILES


def serves(hidden: Tensor, head: Head) -> bool:
    """Whether this problem's forward pass goes by blocks."""
    if head.by_row:
        return False
    if _forced.get():
        return True
    if _has_tiles(hidden.device) or hidden.dtype == torch.float32:
        return False
    width, vocab, size = int(hidden.shape[1]), int(head.weight.shape[0]), hidden.element_size()
    return not tiles.measured(tiles.problem_of(width, vocab, size, hidden.device), hidden.device)


@triton.jit(do_not_specialize=["row_start", "column_start", "rows", "columns"])
def linear_block_kernel(
    z_ptr, bias_ptr, targets_ptr, parts_ptr, saved, shift_ptr,
    row_start, column_start, rows, columns, vocab, kept_columns, shifts, stride_z, stride_saved, temperature, softcap,
    SPLITS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr, ENTROPY: tl.constexpr, SAVE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The parts of `linear_stats_kernel` from z [·, columns] of the rows from row_start, columns from column_start.

    One program: ROWS rows, SPAN columns. Shifts stand for PART columns, of which a step has several.
    """
    block, span = tl.program_id(0) // SPANS, tl.program_id(0) % SPANS
    local = block * ROWS + tl.arange(0, ROWS)
    r = row_start + local
    inside = r < rows
    target = tl.load(targets_ptr + r, mask=inside, other=-1)
    target = tl.where((target >= 0) & (target < vocab), target, -1).to(tl.int32)
    scale = LOG2E / temperature
    peak = tl.full((ROWS,), NEG_INF, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    picked = tl.zeros((ROWS,), tl.float32)
    given = total
    if SAVE == 2:
        given = tl.load(shift_ptr + r, mask=inside, other=0.0)
    for start in range(span * SPAN, min((span + 1) * SPAN, columns), WIDTH):
        at = start + tl.arange(0, WIDTH)
        cols = column_start + at
        z = tl.load(
            z_ptr + local[:, None].to(tl.int64) * stride_z + at[None, :],
            mask=inside[:, None] & (at < columns)[None, :], other=0.0,
        )  # fmt: skip
        z, _ = tile_logits(z, cols, bias_ptr, vocab, temperature, softcap, BIAS, SOFTCAP)
        # As in linear_forward.py: max is subtracted before anything is scaled, which leaves 0 of the largest logit.
        picked += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)
        new = tl.maximum(peak, tl.max(z, 1))
        base = tl.where(new == NEG_INF, 0.0, new)
        moved = tl.maximum((peak - base) * scale, FLOOR)
        decay = tl.exp2(moved)
        z = (z - base[:, None]) * scale
        e = tl.exp2(z)
        if ENTROPY:
            weighted = decay * (weighted + total * moved) + tl.sum(e * tl.maximum(z, FLOOR), 1)
        total = total * decay + tl.sum(e, 1)
        peak = new
        if SAVE == 2:
            e *= tl.exp2(tl.minimum(base * scale - given, HIGHEST))[:, None]
        if SAVE:
            out = saved + r[:, None].to(tl.int64) * stride_saved + cols[None, :]
            tl.store(out, e.to(saved.dtype.element_ty), mask=inside[:, None] & (cols < kept_columns)[None, :])
        if SAVE == 1:
            for i in tl.static_range(WIDTH // PART):
                part = (column_start + start) // PART + i
                there = inside & (tl.zeros((ROWS,), tl.int32) + part < shifts)
                tl.store(shift_ptr + tl.cast(part, tl.int64) * rows + r, base * scale, mask=there)
    split = column_start // SPAN + span
    out = parts_ptr + tl.cast(split, tl.int64) * rows + r
    plane = tl.cast(rows, tl.int64) * SPLITS
    tl.store(out, peak * scale, mask=inside)
    tl.store(out + plane, total, mask=inside)
    tl.store(out + 2 * plane, picked * scale, mask=inside)
    if ENTROPY:
        tl.store(out + 3 * plane, weighted, mask=inside)


def linear_forward_blocks(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    ignore_index: int,
    want_entropy: bool = False,
    save_dtype: torch.dtype | None = None,
    save_share: float = 1.0,
    row_shift: Tensor | None = None,
) -> LinearStats:
    """As `linear_forward_triton`."""
    n, vocab, device, f32 = hidden.shape[0], head.weight.shape[0], hidden.device, torch.float32
    run = LinearLaunch(hidden, head)
    targets = targets.contiguous()
    part = run.tiles.logits(head.bias is not None, head.softcap > 0, True).part
    splits = triton.cdiv(vocab, SPAN)
    to = empty_results(hidden, head, want_entropy, save_dtype, save_share, row_shift)
    for n0 in range(0, n, to.step):
        h, t = hidden[n0 : n0 + to.step], targets[n0 : n0 + to.step]
        rows = h.shape[0]
        parts = torch.empty((3 + want_entropy, splits, rows), dtype=f32, device=device)
        for v0 in range(0, vocab, BLOCK_COLUMNS):
            right = head.weight[v0 : v0 + BLOCK_COLUMNS].T
            columns = right.shape[1]
            spans = triton.cdiv(columns, SPAN)
            for r0 in range(0, rows, BLOCK_ROWS):
                z = product(h[r0 : r0 + BLOCK_ROWS], right, f32)
                with launching("linear_block", device):
                    linear_block_kernel[(triton.cdiv(z.shape[0], ROWS) * spans,)](
                        z, run.bias, t, parts, to.saved, to.shift,
                        r0, v0, rows, columns, vocab, min(to.saved.shape[1], vocab),
                        to.shift.shape[0], z.stride(0), to.saved.stride(0), head.temperature, head.softcap,
                        SPLITS=splits, SPANS=spans, SPAN=SPAN, ENTROPY=want_entropy, SAVE=to.save,
                        ROWS=ROWS, WIDTH=max(WIDTH, part) if to.save else WIDTH, PART=part,
                        BIAS=head.bias is not None, SOFTCAP=head.softcap > 0, num_warps=4, **tiles.FUSION,
                    )  # fmt: skip
        with launching("linear_merge", device):
            linear_merge_kernel[(triton.cdiv(rows, 128),)](
                parts, t, to.logp[n0:], to.entropy[n0:], to.lse[n0:], rows, vocab, ignore_index,
                SPLITS=splits, ENTROPY=want_entropy, BLOCK=128, num_warps=4, **tiles.FUSION,
            )  # fmt: skip
    nothing = Found(*(torch.empty(0, dtype=d, device=device) for d in (f32, torch.bool, f32)))
    return to.stats(nothing)


def linear_forward_on_device(
    hidden: Tensor, targets: Tensor, head: Head, *args, extras: Extras = NO_EXTRAS, **kw
) -> LinearStats:
    """The forward pass that this problem's device has: by tiles, or by blocks where there are none."""
    if any(extras) or not serves(hidden, head):
        return linear_forward_triton(hidden, targets, head, *args, extras=extras, **kw)
    return linear_forward_blocks(hidden, targets, head, *args, **kw)
