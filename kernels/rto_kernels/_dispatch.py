"""Which implementation runs, how often a kernel was launched, and what counts as good input.

Dispatch is by device. On a GPU the Triton kernels run, never silently anything else. On CPU tensors the
chunked PyTorch path runs, except where Triton's interpreter was switched on (TRITON_INTERPRET=1 in the
environment before the first import), which then runs the kernels themselves. `backend=` overrides both.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Triton decides at decoration time whether a kernel is compiled or interpreted: one look at import is right.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS_TORCH = (*FLOATS, torch.float64)  # fp64 stays fp64, on the PyTorch path alone
INDICES = (torch.int32, torch.int64)

_launches: Counter[str] = Counter()


class Held(NamedTuple):
    """A launch that was not made."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]


_held: ContextVar[list[Held] | None] = ContextVar("held", default=None)


def resolve_backend(backend: str | None, tensor: Tensor) -> str:
    """Return "triton" or "torch" for a call whose first tensor is `tensor`.

    Raises ValueError for an unknown name, and for "triton" on a device that cannot run it.
    """
    if backend not in (None, "triton", "torch"):
        raise ValueError(f"backend must be None, 'triton' or 'torch', got {backend!r}")
    on_gpu = tensor.device.type == "cuda"
    if backend == "triton" and not (on_gpu or INTERPRET):
        raise ValueError(
            "backend='triton' needs a CUDA tensor, or TRITON_INTERPRET=1 set before rto_kernels is imported; "
            f"got a tensor on {tensor.device}"
        )
    if backend is not None:
        return backend
    return "triton" if on_gpu or (INTERPRET and tensor.device.type == "cpu") else "torch"


def count_launch(kernel: str) -> None:
    """Every launcher calls this once per kernel launch."""
    _launches[kernel] += 1


def launching(kernel: str, device: torch.device) -> AbstractContextManager:
    """Count a launch, and make it on the tensors' device: Triton itself takes whichever is current."""
    if _held.get() is not None:
        return nullcontext()
    count_launch(kernel)
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def on_grid(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """`kernel[grid]`; inside `holding_launches` what takes its place."""
    held = _held.get()
    return kernel[grid] if held is None else lambda *args, **options: held.append(Held(kernel, grid, args, options))


@contextmanager
def holding_launches() -> Iterator[list[Held]]:
    """Inside, what `on_grid` is asked to launch is written into the list and not launched."""
    held: list[Held] = []
    token = _held.set(held)
    try:
        yield held
    finally:
        _held.reset(token)


@contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Yield a Counter that holds, after the block, the launches made inside it, by kernel name."""
    before = _launches.copy()
    inside: Counter[str] = Counter()
    yield inside
    inside.update(_launches - before)


def values_checked(tensor: Tensor) -> bool:
    """Whether contents (not only shape and dtype) are checked: reading them on a GPU would stall the host."""
    # A subclass is a FakeTensor, or something else without contents of its own.
    if torch.compiler.is_compiling() or tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return tensor.device.type == "cpu" or os.environ.get("RTO_KERNELS_CHECK", "0") == "1"


def batch_invariant(deterministic: str | None) -> bool:
    """Whether a row's bits shall depend on nothing but the row; ValueError unless None or "batch"."""
    if deterministic not in (None, "batch"):
        raise ValueError(f"deterministic must be None or 'batch', got {deterministic!r}")
    return deterministic == "batch"


def describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def check_tensor(
    name: str,
    tensor: Tensor,
    *,
    shape: tuple[int | None, ...] | None = None,
    expect: str = "",
    dtypes: tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise ValueError naming the argument unless it is a plain local tensor of that shape, dtype and device.

    `shape` may hold None where any size goes; `expect` is how the message spells the expected shape.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor{f' {expect}' if expect else ''}, got {type(tensor).__name__}")
    check_local(name, tensor)
    if shape is not None:
        same_rank = len(shape) == tensor.ndim
        if not same_rank or any(s is not None and s != t for s, t in zip(shape, tensor.shape, strict=True)):
            wanted = expect or str([("*" if s is None else s) for s in shape])
            raise ValueError(f"{name} must have shape {wanted}, got {describe(tensor)}")
    if dtypes is not None and tensor.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} must have dtype {wanted}, got {describe(tensor)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other arguments, got {describe(tensor)}")


def detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def check_local(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor that holds only a shard: a DTensor, or a ZeRO-3 partitioned parameter."""
    if hasattr(tensor, "device_mesh"):
        raise ValueError(
            f"{name} is a DTensor of global shape {list(tensor.shape)}; pass {name}.full_tensor(), or its "
            f"local shard {name}.to_local() together with process_group="
        )
    if hasattr(tensor, "ds_id") and tensor.numel() == 0 and getattr(tensor, "ds_numel", 0) > 0:
        raise ValueError(
            f"{name} is a ZeRO-3 partition of shape {list(getattr(tensor, 'ds_shape', []))}; {ZERO3_REMEDY}"
        )


# Gathered for the forward pass alone, a weight is gone when the backward pass reads it.
ZERO3_REMEDY = (
    "make the call in the forward() of the module that owns it, which DeepSpeed gathers for both passes, or keep "
    "`with deepspeed.zero.GatheredParameters([...]):` open until backward() has returned, or pass "
    "token_logprobs a `gather`"
)


def check_unreleased(name: str, tensor: Tensor, size: int) -> None:
    """Raise ValueError in a backward pass whose saved tensor of `size` elements has been taken away since."""
    if tensor.numel() != size:
        raise ValueError(
            f"{name} had {size} elements in the forward pass and has {tensor.numel()} in the backward pass: a ZeRO-3 "
            f"parameter that was released in between; {ZERO3_REMEDY}"
        )


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int, device: torch.device) -> None:
    """cu_seqlens [B + 1]: 0, then each sequence's end, never falling, the last one equal to `tokens`."""
    check_tensor("cu_seqlens", cu_seqlens, shape=(None,), expect="[B + 1]", dtypes=INDICES, device=device)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens must have shape [B + 1] with at least its leading 0, got an empty tensor")
    if values_checked(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != tokens or any(b < a for a, b in pairwise(ends)):
            raise ValueError(
                f"cu_seqlens must start at 0, never fall and end at the {tokens} packed tokens, "
                f"got {describe(cu_seqlens)} = {ends if len(ends) <= 16 else [*ends[:8], '...', *ends[-8:]]}"
            )
