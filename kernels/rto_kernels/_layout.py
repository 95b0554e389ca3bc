"""The two token layouts every token-sized function takes, and what its kernels need to walk them.

padded   tokens [B, T], optional mask [B, T] (bool, or numbers: nonzero is inside) that leaves tokens out
packed   tokens [N], cu_seqlens [B + 1]: sequence b is tokens[cu_seqlens[b] : cu_seqlens[b + 1]], maybe empty;
         a mask [N] may leave tokens out here too
"""

from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import check_cu_seqlens, check_tensor

# Tokens a program handles at once. Fixed, so that a sequence's bits depend on nothing but the sequence. One
# block covers 1024 generated tokens: at 128 × 1024 each program runs its loop body once.
BLOCK = 1024
# Of the per-sequence partial results, how many the last program merges at once.
MERGE_ROWS = 64
# FMA contraction is Triton's default up to 3.9 and not from 3.10 on; results shall not depend on the release.
# The register bound is lifted, since these grids are too small for occupancy to matter and sm_80 would spill; eight
# warps, since with four some variants spill even so.
LAUNCH = {"num_warps": 8, "maxnreg": 255, "enable_fp_fusion": True}

_counters: dict[tuple[int | None, int], Tensor] = {}


def check_layout(name: str, tokens: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> int:
    """Check `tokens` (called `name`) against cu_seqlens and mask; return the number of sequences B."""
    if cu_seqlens is None:
        check_tensor(name, tokens, shape=(None, None), expect="[B, T] (or [N] with cu_seqlens=)")
        rows = tokens.shape[0]
    else:
        check_tensor(name, tokens, shape=(None,), expect="[N], packed, when cu_seqlens is given")
        check_cu_seqlens(cu_seqlens, tokens.shape[0], tokens.device)
        rows = cu_seqlens.shape[0] - 1
    if mask is not None:
        check_tensor(
            "mask",
            mask,
            shape=tuple(tokens.shape),
            expect=f"{list(tokens.shape)} like {name}",
            device=tokens.device,
        )
    return rows


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 where any input is fp64 (tests), else fp32, whatever the inputs' precision."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


@triton.jit
def row_bounds(cu_ptr, row, width, PACKED: tl.constexpr):
    """First token of a sequence and the one after its last, in int64: T·B may pass 2³¹."""
    if PACKED:
        start = tl.load(cu_ptr + row).to(tl.int64)
        end = tl.load(cu_ptr + row + 1).to(tl.int64)
    else:
        start = row.to(tl.int64) * width
        end = start + width
    return start, end


@triton.jit
def load_inside(mask_ptr, offs, in_row, MASKED: tl.constexpr):
    """Which of the tokens at `offs` are inside the sequence and its mask."""
    if MASKED:
        return in_row & (tl.load(mask_ptr + offs, mask=in_row, other=0) != 0)
    else:
        return in_row


@triton.jit
def arrive_last(counter_ptr):
    """True in the one program that comes last, which then sees what all others stored. Resets the counter.

    The order of arrival decides who merges, never in which order the partial results are merged.
    """
    tl.debug_barrier()
    programs = tl.num_programs(0)
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


def arrival_counter(device: torch.device) -> Tensor:
    """A zeroed int32 that `arrive_last` leaves zeroed: one a stream, so that two launches never share it."""
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        # Memory of the graph's own pool must not outlive the graph in a cache.
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters:
        # torch.compile(mode="reduce-overhead") warms up with this thread's allocations in a graph's own pool, which
        # ends with the graph; another thread's are not.
        with ThreadPoolExecutor(1) as other:
            _counters[key] = other.submit(_lasting_zero, device).result()
    return _counters[key]


def _lasting_zero(device: torch.device) -> Tensor:
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)
    return zero


def kernel_mask(mask: Tensor | None, stand_in: Tensor) -> Tensor:
    """The mask as a kernel reads it: contiguous, bool as bytes; any pointer stands in where there is none."""
    if mask is None:
        return stand_in
    mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask
