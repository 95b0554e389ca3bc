"""Compile every kernel launch of this package for chips that need not be present, and look at the result.

    python -m rto_kernels.aot [--chips sm80,sm90,sm100] [--match linear_stats] [--markdown]

The launches are not listed by hand. The public functions are called with backend="triton" on small CPU
tensors while launches are recorded instead of run, so what gets compiled is what the launchers select: tiles,
tensor descriptors, flags, and the specialisation on alignment. For each one the table shows registers, stack,
spill instructions, shared memory and whether the tensor cores and the copy engine are used; the exit status
is 1 where a promise is broken:

- no stack, no local loads or stores, and no more shared memory than the chip has, for any launch
- a matrix product of 16-bit inputs on sm90 whose rows are whole 16 bytes uses wgmma and the copy engine
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import rto_kernels as rk

# All kernel files by name: each reads INTERPRET as it is imported, which must not happen while launches are
# recorded.
from . import _dispatch, _vocab_torch, fused_rewards, linear_blocks, linear_logprob, linear_ppo, logits_logprob, tiles  # noqa: F401
from ._sass import InnerLoop, dump, inner_loops

CHIPS = {"sm80": 80, "sm90": 90, "sm100": 100}
# Bytes of shared memory a block may have (CUDA C++ Programming Guide, table of technical specifications).
SHARED = {"sm80": 163 << 10, "sm90": 227 << 10, "sm100": 227 << 10}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "i1",
}  # fmt: skip


# Constants that a variant is not told apart by.
_HIDDEN = {
    "TMA",
    "SPLITS",
    "PER_SPLIT",
    "GROUP",
    "PARTS",
    "PRECISION",
    "MERGE_ROWS",
    "COLUMNS",
    "RATIO_MAX",
    "N_STATS",
}


class Launch(NamedTuple):
    kernel: JITFunction
    chip: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]  # positions of arguments that are multiples of 16
    options: tuple[tuple[str, object], ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.strip("_").removesuffix("_kernel")

    @property
    def is_product(self) -> bool:
        return "PRECISION" in dict(self.constants)

    @property
    def descriptors(self) -> bool:
        return any(kind.startswith("tensordesc") for _, kind in self.signature)

    @property
    def dtype(self) -> str:
        """That of the first floating-point operand."""
        return next((m[0] for _, kind in self.signature if (m := re.search(r"bf16|fp16|fp32|fp64", kind))), "")

    @property
    def variant(self) -> str:
        shown = ((k, v) for k, v in self.constants if k.isupper() and k not in _HIDDEN)
        words = (k.lower() if v is True else f"{k.lower()}={v}" for k, v in shown if v is not False)
        return " ".join(words) + ("" if self.aligned else " unaligned")


# Local loads and stores that a product kernel may have outside its loop over the inner dimension.
SPILLS_A_TILE = 40
# Waits of a step whose products overlap with the step before; where ptxas cannot prove that they may, two a product.
WAITS_A_STEP = 2


class Proof(NamedTuple):
    launch: Launch
    registers: int
    stack: int
    spills: int  # local loads and stores
    shared: int  # bytes, dynamic and static
    tensor_cores: str
    copy_engine: bool
    loops: tuple[InnerLoop, ...] = ()  # those over the inner dimension of a product
    failure: str = ""  # of the compiler

    @property
    def broken(self) -> str:
        """The promise that this launch breaks, or ''."""
        if self.failure:
            return self.failure
        launch = self.launch
        if launch.is_product:
            # What a program spills once a tile, outside the loop over the inner dimension, costs nothing measurable.
            if self.spills > SPILLS_A_TILE:
                return f"STACK {self.stack}, {self.spills} local loads and stores"
            for loop in self.loops:
                if loop.local:
                    return f"{loop.local} local loads and stores in a loop over the inner dimension"
                if loop.waits > WAITS_A_STEP and launch.dtype in ("bf16", "fp16"):
                    return f"{loop.waits} waits for {loop.products} products in a loop: they do not overlap"
        elif self.stack or self.spills:
            return f"STACK {self.stack}, {self.spills} local loads and stores"
        if self.shared > SHARED[launch.chip]:
            return f"{self.shared} bytes of shared memory, {SHARED[launch.chip]} are there"
        if launch.chip == "sm90" and launch.descriptors and launch.is_product:
            if not self.copy_engine:
                return "no TMA"
            if launch.dtype in ("bf16", "fp16") and self.tensor_cores != "wgmma":
                return "no wgmma"
        return ""


def _describe(kernel: JITFunction, chip: str, args: tuple, kwargs: dict) -> Launch:
    names = [p.name for p in kernel.params]
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    signature, constants, aligned = [], [], []
    for position, name in enumerate(names):
        value = given[name]
        is_one = type(value) is int and value == 1 and not kernel.params[position].do_not_specialize
        if name in constexprs or value is None or is_one:
            # Triton specialises on 1, as it does on a constexpr.
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature.append((name, f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>"))
        elif isinstance(value, Tensor):
            signature.append((name, "*" + _TYPES[value.dtype]))
            if value.data_ptr() % 16 == 0:
                aligned.append(position)
        elif isinstance(value, bool):
            signature.append((name, "i1"))
        elif isinstance(value, int):
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and not kernel.params[position].do_not_specialize:
                aligned.append(position)
        else:
            signature.append((name, "fp32"))
    options = tuple(sorted((k, v) for k, v in kwargs.items() if k not in names and k not in ("grid", "warmup")))
    return Launch(kernel, chip, tuple(signature), tuple(constants), tuple(aligned), options)


@contextmanager
def recording(chip: str) -> Iterator[list[Launch]]:
    """Launches inside the block are described into the list as `chip` would get them, and not run."""
    launches: dict[Launch, None] = {}
    out: list[Launch] = []

    def run(kernel, *args, **kwargs):
        launches[_describe(kernel, chip, args, kwargs)] = None

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(tiles, "chip_of", return_value=chip),
        mock.patch.object(_dispatch, "INTERPRET", True),  # lets CPU tensors pass as launchable
        mock.patch.object(_dispatch, "values_checked", return_value=False),
    ):
        yield out
    out.extend(launches)


def _head_calls(dtype: torch.dtype, width: int, vocab: int) -> Iterator[Callable]:
    """Calls that launch the vocabulary-sized kernels with nothing and with everything switched on."""
    n = 256
    hidden = torch.zeros(n, width, dtype=dtype, requires_grad=True)
    weight = torch.zeros(vocab, width, dtype=dtype, requires_grad=True)
    bias = torch.zeros(vocab, dtype=dtype, requires_grad=True)
    targets = torch.zeros(n, dtype=torch.int64)
    row = torch.ones(n)
    cu_seqlens = torch.tensor([0, n], dtype=torch.int32)

    def linear(entropy: bool, full: bool, save: bool, extras: tuple[str, ...] = ()):
        extra = {"bias": bias, "softcap": 30.0} if full else {}
        out = rk.token_logprobs(
            hidden, weight, targets, return_entropy=entropy, backend="triton",
            save_probs=torch.bfloat16 if save else False, extras=extras, **extra,
        )  # fmt: skip
        differentiable = out[: 1 + entropy] if entropy or extras else (out,)
        sum(x.sum() for x in differentiable).backward()

    def by_blocks(entropy: bool, full: bool, save: bool):
        with linear_blocks.forced():
            linear(entropy, full, save)

    for entropy in (False, True):
        for full in (False, True):
            yield lambda entropy=entropy, full=full: linear(entropy, full, False)
            yield lambda entropy=entropy, full=full: linear(entropy, full, True)
    # What the integrations ask for, and all at once beside everything else.
    for extras in (("is_top1",), ("mean_logits",), ("mean_logits", "is_top1"), _vocab_torch.Extras._fields):
        for save in (False, True):
            yield lambda extras=extras, save=save: linear(True, False, save, extras)
        yield lambda extras=extras: linear(True, True, True, extras)
    if dtype != torch.float32:  # which never goes by blocks
        for save in (False, True):
            for full in (False, True):
                yield lambda save=save, full=full: by_blocks(full, full, save)
    if dtype != torch.float16:  # whose gradients it refuses
        for entropy in (False, True):
            yield lambda entropy=entropy: rk.fused_linear_ppo_loss(
                hidden, weight, targets, row, row, cu_seqlens=cu_seqlens, return_entropy=entropy, backend="triton"
            ).policy_loss.backward()


def _logits_calls(dtype: torch.dtype, vocab: int) -> Iterator[Callable]:
    n = 8
    logits = torch.zeros(n, vocab, dtype=dtype, requires_grad=True)
    targets, scores = torch.zeros(n, dtype=torch.int64), torch.zeros(2)
    cu_seqlens, mask = torch.tensor([0, 3, n], dtype=torch.int32), torch.ones(n, dtype=torch.bool)

    def gather(entropy: bool):
        out = rk.logprobs_from_logits(logits, targets, return_entropy=entropy, backend="triton")
        sum(x.sum() for x in (out if entropy else (out,))).backward()

    yield lambda: gather(False)
    yield lambda: gather(True)
    kw = {"beta1": 0.05, "beta2": 0.01, "backend": "triton"}
    three = (logits,) * 3
    yield lambda: rk.logits_token_rewards(*three, targets, scores, cu_seqlens=cu_seqlens, mask=mask, **kw)
    padded = tuple(x.detach().view(2, 4, vocab) for x in three)
    yield lambda: rk.logits_token_rewards(*padded, targets.view(2, 4), scores, dpo_ref_logits=padded[0], **kw)


def _token_calls(dtype: torch.dtype) -> Iterator[Callable]:
    """The token-sized kernels, padded and packed, masked or not."""
    shape = (2, 48)
    for packed in (False, True):
        for masked in (False, True):
            token = torch.zeros(96 if packed else shape, dtype=dtype)
            layout = {
                "cu_seqlens": torch.tensor([0, 40, 96], dtype=torch.int32) if packed else None,
                "mask": torch.ones_like(token, dtype=torch.bool) if masked else None,
                "backend": "triton",
            }
            score = torch.zeros(2)

            def rewards(token=token, layout=layout, score=score):
                rk.token_rewards(token, token, token, score, beta1=0.05, beta2=0.01, **layout)

            def advantages(gaps, token=token, layout=layout, score=score):
                rk.gae(token, token, gaps=gaps, **layout)
                rk.gae(token, token, gaps=gaps, bootstrap=score, **layout)
                rk.rewards_gae(token, token, token, score, token, gaps=gaps, beta1=0.05, beta2=0.01, **layout)

            def loss(full, aggregation, token=token, layout=layout):
                x = token.clone().requires_grad_()
                one = torch.ones((), dtype=torch.float64)
                extra = {
                    "values": x, "old_values": token, "returns": token, "entropy": x, "entropy_coef": 0.1,
                    "sampler_logp": token, "is_cap": 2.0, "whiten": (one, one),
                }  # fmt: skip
                out = rk.ppo_loss(x, token, token, aggregation=aggregation, **(extra if full else {}), **layout)
                (out.policy_loss + out.value_loss).backward()

            def both(token=token, layout=layout):
                x = token.clone().requires_grad_()
                out, _ = rk.gae_ppo_loss(x, token, token, token, x, **layout)
                (out.policy_loss + out.value_loss).backward()

            yield rewards
            for gaps in ("zero", "carry"):
                yield lambda gaps=gaps, advantages=advantages: advantages(gaps)
            for full in (False, True):
                for aggregation in ("sequence", "token"):
                    yield lambda full=full, aggregation=aggregation, loss=loss: loss(full, aggregation)
            yield both


def launches(chip: str) -> list[Launch]:
    """Every distinct launch that the package makes on `chip`: kernels, dtypes, selectable configurations."""
    calls: list[Callable] = []
    for dtype in DTYPES:
        calls += [*_token_calls(dtype)]
        # Rows of whole 16 bytes, as every real model has, and rows that take the pointer kernels.
        for width, vocab in ((64, 1024), (13, 1003)):
            calls += [*_head_calls(dtype, width, vocab)]
        calls += [*_logits_calls(dtype, 16384), *_logits_calls(dtype, 1003)]
    with recording(chip) as found:
        for call in calls:
            call()
    return found


def prove(launch: Launch) -> Proof:
    """Compile one launch for its chip."""
    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), constexprs=dict(launch.constants), attrs=attributes)
    target = GPUTarget("cuda", CHIPS[launch.chip], 32)
    try:
        compiled = triton.compile(source, target=target, options=dict(launch.options))
    except Exception as error:
        return Proof(launch, 0, 0, 0, 0, "", False, (), f"{type(error).__name__}: {error}".split("\n")[0])
    resources, sass = (dump(compiled.asm["cubin"], flag) for flag in ("--dump-resource-usage", "-sass"))
    ptx = compiled.asm["ptx"]
    cores = next((w for w in ("tcgen05", "wgmma", "mma.sync") if w in ptx), "")
    return Proof(
        launch,
        registers=int(re.search(r"REG:(\d+)", resources)[1]),
        stack=int(re.search(r"STACK:(\d+)", resources)[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=compiled.metadata.shared,
        tensor_cores=cores,
        copy_engine="cp.async.bulk.tensor" in ptx,
        loops=inner_loops(sass),
    )


def _row(proof: Proof) -> tuple[str, ...]:
    launch = proof.launch
    return (
        launch.name, launch.chip, launch.dtype, launch.variant, str(proof.registers), str(proof.stack),
        str(proof.spills), str(proof.shared), proof.tensor_cores, "yes" if proof.copy_engine else "",
        proof.broken or "ok",
    )  # fmt: skip


HEADER = (
    "kernel",
    "chip",
    "dtype",
    "variant",
    "registers",
    "stack",
    "spills",
    "shared",
    "tensor cores",
    "TMA",
    "",
)


def summary(proofs: list[Proof], chips: list[str]) -> Iterator[tuple[str, ...]]:
    """One row a kernel and dtype: of each chip the largest figure over the variants."""
    groups: dict[tuple[str, str], list[Proof]] = {}
    for p in proofs:
        groups.setdefault((p.launch.name, p.launch.dtype), []).append(p)

    def cell(group: list[Proof], figure: Callable[[list[Proof]], object]) -> str:
        found = [str(figure([p for p in group if p.launch.chip == chip])) for chip in chips]
        return found[0] if len(set(found)) == 1 else " / ".join(x or "-" for x in found)

    for (name, dtype), group in groups.items():
        yield (
            name, dtype, cell(group, len),
            *(cell(group, lambda ps, f=f: max(getattr(p, f) for p in ps)) for f in Proof._fields[1:5]),
            cell(group, lambda ps: ", ".join(sorted({p.tensor_cores for p in ps} - {""}))),
            cell(group, lambda ps: "yes" if any(p.copy_engine for p in ps) else ""),
            "BROKEN" if any(p.broken for p in group) else "ok",
        )  # fmt: skip


SUMMARY_HEADER = ("kernel", "dtype", "variants", *HEADER[4:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", default="sm80,sm90,sm100")
    parser.add_argument("--match", default="", help="only kernels whose name contains this")
    parser.add_argument("--markdown", action="store_true", help="a table of one row a kernel and dtype")
    args = parser.parse_args()
    if _dispatch.INTERPRET:
        sys.exit("TRITON_INTERPRET must be unset: interpreted kernels cannot be compiled")
    proofs = []
    if not args.markdown:
        print("\t".join(HEADER))
    chips = args.chips.split(",")
    for chip in chips:
        for launch in launches(chip):
            if args.match in launch.name:
                proofs.append(prove(launch))
                if not args.markdown:
                    print("\t".join(_row(proofs[-1])), flush=True)
    broken = [p for p in proofs if p.broken]
    outcome = f"Triton {triton.__version__}: {len(proofs)} launches compiled, {len(broken)} break a promise"
    if args.markdown:
        print(f"{outcome}. Figures of {' / '.join(chips)} where they differ.\n")
        for row in (SUMMARY_HEADER, ("---",) * len(SUMMARY_HEADER), *summary(proofs, chips)):
            print("| " + " | ".join(row) + " |")
    print(outcome, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
