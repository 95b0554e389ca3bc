"""Log-probabilities of chosen tokens straight from hidden states; the [N, V] logits are never held.

    z_iv    = softcap · tanh((hidden_i · weight_v + bias_v) / softcap) / temperature
    logp_i  = z_i,target − lse_i,         lse_i = log Σ_v exp(z_iv)
    H_i     = −Σ_v p_iv · log p_iv,       p_iv  = exp(z_iv − lse_i)
    dz_iv   = g_i·(onehot_iv − p_iv) − gH_i·p_iv·(log p_iv + H_i)      g, gH: upstream gradients

The backward pass computes z again, block by block, or reads the probabilities that `save_probs` kept. By-products of
the forward pass, without a gradient, where `extras` asks for them:

    mean_logits_i = Σ_v z_iv / V,   is_top1_i = (arg max_v z_iv = target_i),   log_sum_sq_probs_i = log Σ_v p_iv²
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._dispatch import (
    FLOATS,
    FLOATS_TORCH,
    INDICES,
    batch_invariant,
    check_tensor,
    check_unreleased,
    describe,
    detached,
    resolve_backend,
    values_checked,
)
from ._layout import compute_dtype
from ._vocab_torch import Extras, Head, LinearGrads, LinearStats, linear_backward, linear_forward, saved_shapes
from .linear_backward import linear_backward_triton
from .linear_blocks import linear_forward_on_device
from .linear_forward import SAVED_ELEMENTS, saved_shapes_triton

IGNORED, ELSEWHERE = -1, -2  # targets of a vocabulary shard that name no column of it


class Passes(NamedTuple):
    """The two vocabulary-sized passes of a backend, and how much of exp(z) may be held between them."""

    # (hidden, targets, head, ignore_index, want_entropy, save_dtype, save_share, extras=)
    forward: Callable[..., LinearStats]
    backward: Callable[..., LinearGrads]  # (hidden, targets, head, stats, grad_logp, grad_entropy, needs, into)
    saved_shapes: Callable[[Tensor, Head, float], tuple]  # (hidden, head, share) → shapes of what is kept
    chunk_tokens: Callable[[int], int]  # vocabulary → tokens of a chunk of fused_linear_ppo_loss
    chunk_dtype: Callable[[Tensor], torch.dtype | None]  # hidden → what such a chunk keeps; None: nothing


def linear_passes(backend: str) -> Passes:
    if backend == "torch":
        return Passes(
            linear_forward,
            linear_backward,
            saved_shapes,
            lambda vocab: max(256, (1 << 24) // vocab),
            compute_dtype,
        )
    return Passes(
        linear_forward_on_device,
        linear_backward_triton,
        saved_shapes_triton,
        lambda vocab: max(128, SAVED_ELEMENTS // vocab // 128 * 128),
        # fp32 keeps nothing, so that its gradients stay fp32's.
        lambda hidden: None if hidden.dtype == torch.float32 else torch.bfloat16,
    )


def kept_dtype(hidden: Tensor) -> torch.dtype:
    """Of the probabilities that are kept: 16 bits, of which fp16 gradients need more behind the point."""
    return torch.float16 if hidden.dtype == torch.float16 else torch.bfloat16


def _grads(hidden, targets, head: Head, stats: LinearStats, g, ge, needs, backend, wide=None) -> list[Tensor]:
    """d(hidden) (in `wide` if given), d(weight), d(bias) in the inputs' dtypes; [0] where not needed."""
    grads = linear_passes(backend).backward(hidden, targets, head, stats, g, ge, needs)
    dtypes = (wide or hidden.dtype, head.weight.dtype, head.weight.dtype)
    return [hidden.new_empty(0) if x is None else x.to(d) for x, d in zip(grads, dtypes, strict=True)]


@torch.library.custom_op("rto_kernels::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    entropy: bool,
    save_share: float,
    by_row: bool,
    backend: str,
    extras: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = Head(weight, bias, temperature, softcap, by_row)
    keep = kept_dtype(hidden) if save_share else None
    stats = linear_passes(backend).forward(
        hidden, targets, head, ignore_index, entropy, keep, save_share, extras=Extras(*extras)
    )
    return *stats[:5], *stats.found


@_linear_logprob.register_fake
def _(hidden, weight, targets, bias, temperature, softcap, ignore_index, entropy, save_share, by_row, backend, extras):
    row = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
    head = Head(weight, bias, temperature, softcap, by_row)
    saved, shift = linear_passes(backend).saved_shapes(hidden, head, save_share) if save_share else ((0,), (0,))
    return (
        row,
        torch.empty_like(row) if entropy else row.new_empty(0),
        torch.empty_like(row),
        row.new_empty(saved, dtype=kept_dtype(hidden)),
        row.new_empty(shift),
        *(
            row.new_empty(row.shape if want else 0, dtype=torch.bool if name == "is_top1" else row.dtype)
            for name, want in zip(Extras._fields, extras, strict=True)
        ),
    )


@torch.library.custom_op("rto_kernels::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    logp: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    saved: Tensor,
    shift: Tensor,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(weight, bias, temperature, softcap)
    stats = LinearStats(logp, entropy, lse, saved, shift)
    return tuple(_grads(hidden, targets, head, stats, grad_logp, grad_entropy, needs, backend))


@_linear_logprob_backward.register_fake
def _(hidden, weight, targets, bias, temperature, softcap, logp, lse, entropy, g, ge, saved, shift, needs, backend):
    need_hidden, need_weight, need_bias = needs
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else weight.new_empty(0),
        torch.empty_like(bias, memory_format=torch.contiguous_format) if need_bias else hidden.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, bias, temperature, softcap, ignore_index, want_entropy, _, _, backend, _ = inputs
    logp, entropy, lse, saved, shift, *found = output
    ctx.save_for_backward(hidden, weight, targets, bias, logp, lse, entropy, saved, shift)
    ctx.mark_non_differentiable(lse, saved, shift, *found, *(() if want_entropy else (entropy,)))
    ctx.set_materialize_grads(False)
    ctx.args = temperature, softcap, ignore_index, backend
    ctx.size = weight.numel()


def _mask_upstream(grad: Tensor | None, ignored: Tensor) -> Tensor | None:
    return None if grad is None else grad.masked_fill(ignored, 0)


def _upstream_to_inputs(ctx, needs, grad_logp, grad_entropy) -> list[Tensor | None]:
    """d(hidden), d(weight), d(bias), None where not needed."""
    hidden, weight, targets, bias, logp, lse, entropy, saved, shift = ctx.saved_tensors
    temperature, softcap, ignore_index, backend = ctx.args
    if grad_logp is None and grad_entropy is None:
        return [None] * 3
    check_unreleased("weight", weight, ctx.size)
    ignored = targets == ignore_index
    grads = _linear_logprob_backward(
        hidden, weight.detach(), targets, detached(bias), temperature, softcap, logp, lse, entropy,
        _mask_upstream(grad_logp, ignored), _mask_upstream(grad_entropy, ignored),
        saved, shift, needs, backend,
    )  # fmt: skip
    return [g if need else None for g, need in zip(grads, needs, strict=True)]


def _backward(ctx, grad_logp, grad_entropy, *_):
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    d_hidden, d_weight, d_bias = _upstream_to_inputs(ctx, needs, grad_logp, grad_entropy)
    return d_hidden, d_weight, None, d_bias, *(None,) * 8


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)


class _GatheredLogprob(torch.autograd.Function):
    """The same of parameters that may be released after the forward pass: `gather` makes them whole again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, ignore_index, want_entropy, *rest):
        save_share, by_row, backend, asked, gather = rest
        ctx.gather = gather
        settings = temperature, softcap, ignore_index, want_entropy, save_share, by_row, backend, asked
        output = _linear_logprob(hidden, weight.detach(), targets, detached(bias), *settings)
        _setup_context(ctx, (hidden, weight, targets, bias, *settings), output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        _, weight, _, bias, *_ = ctx.saved_tensors
        with ctx.gather(*(x for x in (weight, bias) if x is not None)):
            return *_upstream_to_inputs(ctx, list(ctx.needs_input_grad[:3]), *grads[:2]), *(None,) * 10


def _merged_logp(ranks: list[Tensor]) -> Tensor:
    """log p over all shards, from each rank's (lse, log p within its shard, entropy, whether the target is there).

    The owner's log p less log(1 + what the other shards hold beside its own): of a sure token both are near 0 and
    exact, where the difference of two log-sum-exps would leave their rounding.
    """
    owner = sum(torch.where(r[3] == 1, r[0], 0) for r in ranks)  # no product: another shard's may be −inf
    beside = torch.stack([torch.where(r[3] == 1, -torch.inf, r[0] - owner) for r in ranks])
    much = torch.logsumexp(beside, 0)  # where exp() would overflow, log(1 + x) is log x
    return sum(r[1] for r in ranks) - torch.where(much > 20, much, torch.log1p(beside.exp().sum(0)))


class _ShardedLogprob(torch.autograd.Function):
    """The same over a vocabulary split across `group`: every rank gets every row's result, the same bits."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, save_share, by_row, backend, group):
        # `targets` are local: IGNORED where ignored, ELSEWHERE where another rank holds the column.
        head = Head(weight, bias, temperature, softcap, by_row)
        keep = kept_dtype(hidden) if save_share else None
        stats = linear_passes(backend).forward(hidden, targets, head, IGNORED, True, keep, save_share)
        here = targets >= 0
        mine = torch.stack([stats.lse, torch.where(here, stats.logp, 0), stats.entropy, here.to(stats.lse.dtype)])
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, mine, group=group)
        # Merged in rank order, on every rank alike.
        peak = torch.stack([r[0] for r in ranks]).amax(0)
        lse = peak + sum(torch.exp(r[0] - peak) for r in ranks).log()
        found = sum(r[3] for r in ranks) == 1
        ignored = targets == IGNORED
        logp = torch.where(found, _merged_logp(ranks), torch.nan).masked_fill_(ignored, 0)
        entropy = torch.zeros_like(lse)
        for lse_r, _, entropy_r, _ in ranks:
            share = torch.exp(lse_r - lse)
            entropy += torch.where(share == 0, 0.0, share * (entropy_r + lse - lse_r))
        entropy.masked_fill_(ignored, 0)
        ctx.save_for_backward(hidden, weight, targets, bias, logp, lse, entropy, stats.saved, stats.shift)
        ctx.set_materialize_grads(False)
        ctx.args = temperature, softcap, backend, group
        ctx.size = weight.numel()
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, targets, bias, logp, lse, entropy, saved, shift = ctx.saved_tensors
        temperature, softcap, backend, group = ctx.args
        check_unreleased("weight", weight, ctx.size)
        needs = list(ctx.needs_input_grad[:3])
        ignored = targets == IGNORED
        head = Head(weight, bias, temperature, softcap)
        stats = LinearStats(logp, entropy, lse, saved, shift)
        g, ge = _mask_upstream(grad_logp, ignored), _mask_upstream(grad_entropy, ignored)
        d_hidden, d_weight, d_bias = _grads(hidden, targets, head, stats, g, ge, needs, backend, compute_dtype(hidden))
        if needs[0]:
            dist.all_reduce(d_hidden, group=group)
            d_hidden = d_hidden.to(hidden.dtype)
        grads = (g if need else None for g, need in zip((d_hidden, d_weight, d_bias), needs, strict=True))
        return *grads, *(None,) * 7


def _shard_start(rows: int, group) -> int:
    """This rank's first token id: the rows of the weight on the ranks before it."""
    sizes = [None] * dist.get_world_size(group)
    dist.all_gather_object(sizes, rows, group=group)
    return sum(sizes[: dist.get_rank(group)])


def check_linear(backend, hidden, weight, targets, bias, temperature, softcap, ignore_index, sharded=False) -> None:
    """Raise ValueError naming the argument that does not fit."""
    floats = FLOATS if backend == "triton" else FLOATS_TORCH
    check_tensor("hidden", hidden, shape=(None, None), expect="[N, H]", dtypes=floats)
    n, width = hidden.shape
    same = {"dtypes": (hidden.dtype,), "device": hidden.device}
    check_tensor("weight", weight, shape=(None, width), expect=f"[V, {width}] like hidden", **same)
    vocab = weight.shape[0]
    check_tensor("targets", targets, shape=(n,), expect=f"[{n}]", dtypes=INDICES, device=hidden.device)
    if bias is not None:
        check_tensor("bias", bias, shape=(vocab,), expect=f"[{vocab}] like weight", **same)
    if not temperature > 0:
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if softcap is not None and not softcap >= 0:
        raise ValueError(f"softcap must be a positive number, or None or 0 for off, got {softcap}")
    if vocab == 0:
        raise ValueError(f"weight must have at least one row (a vocabulary), got {describe(weight)}")
    if not sharded and values_checked(targets):
        bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocab))
        if bool(bad.any()):
            raise ValueError(
                f"targets must be in [0, {vocab}) or ignore_index {ignore_index}, "
                f"got {targets[bad][:4].tolist()} in {describe(targets)}"
            )


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    extras: Sequence[str] = (),
    save_probs: bool | torch.dtype = False,
    save_share: float = 1.0,
    process_group=None,
    vocab_start: int | None = None,
    gather: Callable[..., AbstractContextManager] | None = None,
    deterministic: str | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Log-probability of each target token: `log_softmax(z)[i, targets[i]]`, z as at the top of this file.

    hidden   [N, H] bf16, fp16 or fp32 (fp64 on the PyTorch path)
    weight   [V, H] of hidden's dtype; with `process_group` this rank's rows, shards may differ in size
    targets  [N] int32 or int64; rows at `ignore_index` give 0 and take no gradient
    bias     [V] or None
    returns  logp [N] fp32 (fp64 for fp64), and with `return_entropy` also the entropy [N]; then [N] each, in the order
             of `extras`, what that names among "mean_logits", "is_top1" (bool: the target has the highest logit, of
             equals it is the first) and "log_sum_sq_probs", without gradients and 0 at ignored rows

    Differentiable in hidden, weight and bias, through logp and entropy both; a gradient nobody needs (a
    frozen weight) is not computed, and rows with a zero upstream gradient are skipped.

    `save_probs` keeps exp(z − shift) in bf16 (fp16 for fp16) for the backward pass: 2·N·V bytes in place of a third
    matrix product. True is for bf16 and fp16 inputs; fp32 inputs must ask for torch.bfloat16 by name. `save_share`,
    in (0, 1], keeps that share of the vocabulary, in whole blocks, and computes the rest again: memory and time
    lie between.

    `process_group`: hidden and targets (global ids) are the same on every rank, and so are the results;
    d(hidden) is summed over the ranks inside, d(weight) and d(bias) are this rank's. `vocab_start` is the
    first id of this rank's rows, found by one exchange of sizes when None.

    `gather` is for a ZeRO-3 weight that is whole now and released before the backward pass, which then calls
    gather(weight) or gather(weight, bias) and works inside the context manager that it gives, as
    `lambda *p: deepspeed.zero.GatheredParameters([*p])` does.

    The same input gives the same bits, always. `deterministic="batch"` promises more: a row's logp and entropy
    have the same bits whatever rows stand beside it. The Triton path does that anyway; the PyTorch path then
    gives up the vendor's matrix product in the forward pass for one row at a time, several times slower.

    Raises ValueError for a wrong shape, dtype or device, for an unknown name in `extras` or any with
    `process_group`, for a DTensor or a ZeRO-3 partitioned weight (in the
    backward pass too, where one was released in between), and, where values can be read without stalling a GPU, for
    a target outside the vocabulary (on a GPU: NaN).
    """
    check_tensor("hidden", hidden)
    backend = resolve_backend(backend, hidden)
    by_row = batch_invariant(deterministic)
    sharded = process_group is not None
    check_linear(backend, hidden, weight, targets, bias, temperature, softcap, ignore_index, sharded)
    if save_probs is True and hidden.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"save_probs=True keeps probabilities in bfloat16, which suits bf16 and fp16 inputs; hidden is "
            f"{describe(hidden)}: pass save_probs=torch.bfloat16 to accept that rounding"
        )
    if save_probs not in (True, False, torch.bfloat16):
        raise ValueError(f"save_probs must be True, False or torch.bfloat16, got {save_probs!r}")
    if not 0 < save_share <= 1:
        raise ValueError(f"save_share must be in (0, 1], got {save_share}")
    unknown = [name for name in extras if name not in Extras._fields]
    if unknown or (extras and sharded):
        raise ValueError(
            f"extras must be empty with process_group, got {tuple(extras)}: a shard cannot know them"
            if sharded
            else f"extras must be among {', '.join(Extras._fields)}, got {', '.join(map(repr, unknown))}"
        )
    if gather is not None and sharded:
        raise ValueError("gather must be None with process_group: each rank's shard stays with it")
    temperature, softcap, save = float(temperature), float(softcap or 0.0), float(save_share) if save_probs else 0.0
    if not sharded:
        asked = [name in extras for name in Extras._fields]
        settings = temperature, softcap, ignore_index, return_entropy, save, by_row, backend, asked
        if gather is None:
            logp, entropy, _, _, _, *found = _linear_logprob(hidden, weight, targets, bias, *settings)
        else:
            logp, entropy, _, _, _, *found = _GatheredLogprob.apply(hidden, weight, bias, targets, *settings, gather)
        if extras:
            by_name = dict(zip(Extras._fields, found, strict=True))
            return logp, *((entropy,) if return_entropy else ()), *(by_name[name] for name in extras)
    else:
        start = _shard_start(weight.shape[0], process_group) if vocab_start is None else vocab_start
        local = targets.long() - start
        local = torch.where((local >= 0) & (local < weight.shape[0]), local, ELSEWHERE)
        local = torch.where(targets == ignore_index, IGNORED, local)
        logp, entropy = _ShardedLogprob.apply(
            hidden, weight, bias, local, temperature, softcap, save, by_row, backend, process_group
        )
    return (logp, entropy) if return_entropy else logp
