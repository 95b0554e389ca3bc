"""The launchers on tensors without memory, at sizes that no CPU holds: what they would launch, and what they allocate.

`recorded(chip)` runs the real launch code of that chip with Triton's launch replaced; `faults(launch)` says what is
wrong with one: a grid that CUDA does not have, a tensor that is not on the device, a descriptor that the copy engine
refuses, offsets of 32 bits into more than 2³¹ elements.
"""

import functools
import importlib
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from rto_kernels import _dispatch, aot, linear_blocks, linear_factored, tiles
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

GRID = (2**31 - 1, 65535, 65535)
BASE = 1 << 40
"""The address that a tensor without memory would have, but for its offset."""


class Made(NamedTuple):
    """A launch: its grid, its arguments by name, and what Triton would compile for it."""

    grid: tuple[int, ...]
    given: dict[str, object]
    compiled: aot.Launch

    @property
    def name(self) -> str:
        return self.compiled.name


class Memory(TorchDispatchMode):
    """Counts the bytes of storages that operators make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


class Record:
    """What was launched. The arguments themselves are forgotten, and so their memory."""

    def __init__(self) -> None:
        self.wrong: set[str] = set()  # faults
        self.compiled: set[aot.Launch] = set()
        self.memory = Memory()

    def names(self) -> set[str]:
        return {x.name for x in self.compiled}

    def add(self, made: Made) -> None:
        self.wrong.update(faults(made))
        self.compiled.add(made.compiled)


# Operators whose fake stands in for them on such tensors, by module. Here the real launch code is wanted.
OPERATORS = {
    "fused_rewards": ("_logits_token_rewards",),
    "gae": ("_gae_op", "_rewards_gae_op"),
    "linear_logprob": ("_linear_logprob", "_linear_logprob_backward"),
    "linear_ppo": ("_linear_ppo",),
    "logits_logprob": ("_logits_logprob", "_logits_logprob_backward"),
    "ppo_loss": ("_ppo_loss_op", "_backward_op"),
    "token_rewards": ("_token_rewards_op",),
}


def address(x: Tensor) -> int:
    return BASE + x.storage_offset() * x.element_size()


def vendor_product(a: Tensor, b: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
    """As on a GPU, where 16-bit operands are multiplied as such: the result is all that is made."""
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype) if into is None else into


@contextmanager
def recorded(chip: str) -> Iterator[Record]:
    """Inside, public functions with backend="triton" on meta tensors launch into the record.

    Gradients of operators that have a backward operator are asked for by name: autograd does not know of them here.
    """
    record = Record()

    def run(kernel, *args, grid, warmup, **options):
        names = [p.name for p in kernel.params]
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
        record.add(Made(tuple(grid), given, aot._describe(kernel, chip, args, options)))

    with ExitStack() as patches:
        for module, names in OPERATORS.items():
            where = importlib.import_module(f"rto_kernels.{module}")
            for name in names:
                patches.enter_context(mock.patch.object(where, name, getattr(where, name)._init_fn))
        for where in (linear_blocks, linear_factored):
            patches.enter_context(mock.patch.object(where, "product", vendor_product))
        patches.enter_context(mock.patch.object(JITFunction, "run", run))
        patches.enter_context(mock.patch.object(Tensor, "data_ptr", address))
        patches.enter_context(mock.patch.object(tiles, "chip_of", return_value=chip))
        patches.enter_context(mock.patch.object(_dispatch, "INTERPRET", True))  # lets them pass as launchable
        patches.enter_context(record.memory)
        yield record


@functools.cache
def ttir(launch: aot.Launch) -> str:
    """The kernel after inlining, before anything that depends on the chip."""
    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), constexprs=dict(launch.constants), attrs=attributes)
    target = GPUTarget("cuda", aot.CHIPS[launch.chip], 32)
    backend = make_backend(target)
    options = backend.parse_options(dict(launch.options) | source.parse_options())
    stages: dict = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    made = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    return str(stages["ttir"](made, {}))


def narrow_pointers(code: str) -> set[str]:
    """Arguments of a kernel (TTIR) that some load or store reaches by offsets of 32 bits alone, or by a product with a
    stride that was widened after it had been made."""
    root: dict[str, str] = {}
    wide: dict[str, bool] = {}
    made: dict[str, tuple[str, list[str]]] = {}  # value → (operator, operands)
    for name in re.findall(r"%(\w+): !tt\.ptr", code):
        root[name], wide[name] = name, False
    found = set()
    for line in code.splitlines():
        # A loop's own names for what it carries: what they are at its start.
        for inner, outer in re.findall(r"%([\w#]+) = %([\w#]+)[,)]", line):
            if outer in root:
                root[inner], wide[inner] = root[outer], wide[outer]
        there = re.match(r"\s*(?:%([\w#]+)(?::\d+)? = )?([\w.]+)\s(.*)", line)
        if not there:
            continue
        name, operator, rest = there.groups()
        operands = re.findall(r"%([\w#]+)", rest.split(" loc(")[0])
        if name:
            made[name] = operator, operands
        if not operands or operands[0] not in root:
            continue
        first = operands[0]
        if operator == "tt.addptr":
            root[name] = root[first]
            wide[name] = wide[first] or bool(re.search(r"(?:x|, )i64>?(?: loc.*)?$", rest.strip()))
            if wide[name] and _widened_late(operands[1], made):
                found.add(root[name])
        elif operator in ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.bitcast", "tt.reshape"):
            root[name], wide[name] = root[first], wide[first]
        elif operator in ("tt.load", "tt.store", "tt.atomic_rmw") and not wide[first]:
            found.add(root[first])
    return found


def _widened_late(value: str, made: dict[str, tuple[str, list[str]]]) -> bool:
    """Whether an offset has a 32-bit product with a stride inside what was widened."""
    todo, narrow = [(value, False)], set()
    while todo:
        name, inside = todo.pop()
        if (name, inside) in narrow or name not in made:
            continue
        narrow.add((name, inside))
        operator, operands = made[name]
        inside |= operator == "arith.extsi"
        if inside and operator == "arith.muli" and any(_is_stride(x, made) for x in operands):
            return True
        todo += [(x, inside) for x in operands]
    return False


def _is_stride(name: str, made: dict[str, tuple[str, list[str]]]) -> bool:
    while name in made and made[name][0] in ("tt.splat", "tt.broadcast"):
        name = made[name][1][0]
    return name.startswith("stride")


def span(x: Tensor) -> int:
    """Elements from a tensor's first to its last."""
    return 0 if x.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))


def faults(made: Made) -> list[str]:
    """What is wrong with a launch; [] where nothing is."""
    found = []
    for axis, (blocks, most) in enumerate(zip(made.grid, GRID, strict=False)):
        if not 0 < blocks <= most:
            found.append(f"{made.name}: {blocks} blocks along {'xyz'[axis]}")
    large = set()
    for name, value in made.given.items():
        tensor = value.base if isinstance(value, TensorDescriptor) else value
        if isinstance(tensor, Tensor):
            if not tensor.is_meta:
                found.append(f"{made.name}: {name} is on {tensor.device}")
            elif isinstance(value, TensorDescriptor):
                found += [f"{made.name}: {name} {why}" for why in _descriptor_faults(value)]
            elif span(tensor) > 2**31 - 1:
                large.add(name)
        elif type(value) is int and not -(2**63) <= value < 2**63:
            found.append(f"{made.name}: {name} = {value}")
    if large:
        found += [
            f"{made.name}: 32-bit offsets into {name}" for name in sorted(large & narrow_pointers(ttir(made.compiled)))
        ]
    return found


def _descriptor_faults(x: TensorDescriptor) -> Iterator[str]:
    """CUDA Driver API, cuTensorMapEncodeTiled."""
    size = x.base.element_size()
    if address(x.base) % 16:
        yield "does not start at 16 bytes"
    if any(s * size % 16 or s * size >= 2**40 for s in x.strides[:-1]):
        yield f"has strides {list(x.strides)}"
    if any(not 0 < n < 2**32 for n in x.shape):
        yield f"has shape {list(x.shape)}"
    if any(not 0 < n <= 256 for n in x.block_shape):
        yield f"has blocks of {x.block_shape}"
