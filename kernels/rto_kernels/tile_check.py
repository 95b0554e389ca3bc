"""Whether measured tiles can be used here: their kernels are compiled, and say what they take of the GPU.

A compiled kernel tells its registers, its shared memory and whether it spills; where it does, its machine code tells
whether inside a loop over the inner dimension, where that costs on every step. Nothing is launched, and no tensor has
memory. Triton keeps what it compiles on disk, and the run launches the same kernels.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton

from . import tiles
from ._dispatch import Held, holding_launches
from ._sass import dump, spills_in_loops
from ._vocab_torch import Head
from .linear_backward import linear_backward_triton
from .linear_forward import linear_forward_triton
from .tiles import Problem, Tiles

REGISTERS = 65536
"""Of a multiprocessor, and so of a block, on every chip from sm_80 on."""
WARP = 32
ROWS = 64
"""Of the tensors without memory; kernels do not depend on it."""


class Compiled(NamedTuple):
    """What a compiled kernel says of itself."""

    kernel: str
    warps: int
    registers: int  # a thread
    shared: int  # bytes a block
    spills: int  # loads and stores of spilled registers inside its loops over the inner dimension


def objection(found: Compiled, shared: int) -> str:
    """Why the kernel cannot be used on a GPU that gives a block `shared` bytes; '' where it can."""
    if found.shared > shared:
        return f"{found.kernel} takes {found.shared:,} bytes of shared memory, the GPU has {shared:,}"
    if found.warps * WARP * found.registers > REGISTERS:
        taken = found.warps * WARP * found.registers
        return f"{found.kernel} takes {taken:,} registers, the GPU has {REGISTERS:,}"
    if found.spills:
        return f"{found.kernel} spills registers in its inner loop ({found.spills} loads and stores)"
    return ""


def launches(choice: Tiles, problem: Problem) -> list[Held]:
    """The matrix products that passes over such a head launch with these tiles, each variant once."""
    dtype = torch.bfloat16 if problem.itemsize == 2 else torch.float32
    with tiles.trying(choice, problem.chip), holding_launches() as held:
        hidden = torch.empty(ROWS, problem.width, dtype=dtype, device="meta")
        weight, bias = (torch.empty(problem.vocab, *n, dtype=dtype, device="meta") for n in ((problem.width,), ()))
        targets = torch.empty(ROWS, dtype=torch.int64, device="meta")
        row = torch.empty(ROWS, device="meta")
        plain, full = Head(weight, None, 1.0, 0.0), Head(weight, bias, 1.0, 1.0)
        every = (True, True, False)
        for entropy in (False, True):
            gradient = row if entropy else None
            for keep in (None, torch.bfloat16):
                stats = linear_forward_triton(hidden, targets, plain, -100, entropy, keep)
                linear_backward_triton(hidden, targets, plain, stats, row, gradient, every)
            linear_forward_triton(hidden, targets, plain, -100, entropy, torch.bfloat16, row_shift=row)
        stats = linear_forward_triton(hidden, targets, full, -100, True)
        linear_backward_triton(hidden, targets, full, stats, row, row, every)
    variants = {(x.kernel.__name__, str(sorted(x.options.items()))): x for x in held if "PRECISION" in x.options}
    return list(variants.values())


def compiled(launch: Held, device: torch.device) -> Compiled:
    """One launch, compiled for the device and loaded there. Raises what Triton raises."""
    with torch.cuda.device(device):
        kernel = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
        kernel._init_handles()  # which finds out the registers
    return described(launch.kernel.__name__, kernel, kernel.n_regs, kernel.n_spills)


def described(name: str, kernel: Any, registers: int, spilled: int) -> Compiled:
    """spilled: registers that were spilled anywhere, of which those in loops are counted."""
    spills = 0
    if spilled:
        try:
            spills = spills_in_loops(dump(kernel.asm["cubin"], "-sass"))
        except OSError:  # Triton came without the tool: what cannot be told apart counts
            spills = spilled
    return Compiled(name.removesuffix("_kernel"), kernel.metadata.num_warps, registers, kernel.metadata.shared, spills)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]


def objection_to(choice: Tiles, problem: Problem, device: torch.device) -> str:
    """Why these tiles cannot be used for the problem on the device; '' where they can."""

    def look() -> str:
        try:
            limit = shared_memory(device)
            for launch in launches(choice, problem):
                if why := objection(compiled(launch, device), limit):
                    return why
        except Exception as error:  # a compiler may fail in any way
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return ""

    # A thread of its own has none of torch's modes, of which a compiler's would make fake tensors of these.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(look).result()
