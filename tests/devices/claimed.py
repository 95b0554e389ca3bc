"""Tensors that hold their data on the CPU and say that they are on another device.

`install()` makes a device `dry:0` known to this process (for good, so that it wants a process of its own). What is made
there, or moved there, is a `Claimed`: its operations run on the CPU tensor inside, and raise `DeviceMix` where a GPU
would refuse: at a CPU tensor of one dimension or more, and at an index of a CPU tensor that lies on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
NAME = "dry"
MOVES = (aten.to, aten._to_copy, aten.copy_, aten._copy_from)
"""Operations that may read one device and write another."""
INDEXED = (
    aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default,
)  # fmt: skip
"""Operations that take indices from the CPU too, for a tensor on the device; their values must be where it is."""


class DeviceMix(RuntimeError):
    """Tensors of two devices in one operation."""


class Claimed(Tensor):
    """A tensor of `dry:0`; `held` is the CPU tensor."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Claimed:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=device(),
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Claimed({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def device() -> torch.device:
    return torch.device(NAME, 0)


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on what is held; its results are where a GPU's would be."""
    flat, shape = tree_flatten((args, kwargs))
    claimed = [x for x in flat if isinstance(x, Claimed)]
    if claimed and func.overloadpacket not in MOVES:
        _refuse_mix(func, args, flat)
    asked = next((x for x in flat if isinstance(x, torch.device)), None)
    held_args, held_kwargs = tree_unflatten([_held(x) for x in flat], shape)
    out = func(*held_args, **held_kwargs)
    if func is aten.copy_.default or func is aten.to.other:
        here = isinstance(args[func is aten.to.other], Claimed)
    else:
        here = asked.type == NAME if asked else bool(claimed)
    if not here:
        return out
    same = {id(x.held): x for x in claimed}  # in-place operations and out= give back the very object
    return tree_map(lambda x: (same[id(x)] if id(x) in same else Claimed(x)) if isinstance(x, Tensor) else x, out)


def _held(value: Any) -> Any:
    """What stands on the CPU for an argument."""
    if isinstance(value, Claimed):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def _refuse_mix(func: Any, args: tuple[Any, ...], flat: list[Any]) -> None:
    strays = [
        x for x in flat if isinstance(x, Tensor) and not isinstance(x, Claimed) and x.device.type == "cpu" and x.ndim
    ]
    if func in INDEXED:
        if not isinstance(args[0], Claimed):
            raise DeviceMix(f"{func}: an index on {NAME}:0 into a CPU tensor {tuple(args[0].shape)}")
        strays = [x for x in strays if len(args) > 2 and x is args[2]]
    if strays:
        raise DeviceMix(f"{func}: {NAME}:0 meets a CPU tensor {tuple(strays[0].shape)} {strays[0].dtype}")


class _Everything(TorchDispatchMode):
    """Operations without a claimed argument that are to make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Bindings(TorchFunctionMode):
    """What Python reads from memory or writes there past every operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func in (torch.tensor, torch.as_tensor)
            and not isinstance(args[0], Tensor)
            and kwargs.get("device") is not None
        ):
            return func(*args, **(kwargs | {"device": "cpu"})).to(kwargs["device"])
        if func is Tensor.new_tensor and isinstance(args[0], Claimed):
            return func(args[0].held, *args[1:], **(kwargs | {"device": "cpu"})).to(kwargs.get("device", device()))
        if args and isinstance(args[0], Claimed):
            if func in (Tensor.numpy, Tensor.__array__):
                raise DeviceMix(f"numpy() of a tensor {tuple(args[0].shape)} on {NAME}:0")
            if func is Tensor.__getitem__ and isinstance(args[1], list):  # whose tensor would be made on the device
                return func(args[0], torch.tensor(args[1]))
            if func is Tensor.tolist:
                return args[0].held.tolist()
            if func is Tensor.data_ptr:
                return args[0].held.data_ptr()
        if func == Tensor.data.__set__ and any(isinstance(x, Claimed) for x in args):
            return _set_data(*args)
        return func(*args, **kwargs)


def _set_data(tensor: Tensor, data: Tensor) -> None:
    """`tensor.data = data` between devices too, as GPUs allow."""
    if isinstance(tensor, Claimed) and isinstance(data, Claimed):
        tensor.held = data.held
    elif isinstance(tensor, torch.nn.Parameter):
        torch.utils.swap_tensors(tensor, torch.nn.Parameter(data.detach(), requires_grad=tensor.requires_grad))
    else:
        torch.utils.swap_tensors(tensor, data.detach())


@contextmanager
def on_device() -> Iterator[torch.device]:
    """Inside, `dry:0` is a device like another."""
    with _Everything(), _Bindings():
        yield device()


def install() -> None:
    """Makes the device known to this process."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME)
    torch.__future__.set_swap_module_params_on_conversion(True)  # a module's parameters stay the same objects
