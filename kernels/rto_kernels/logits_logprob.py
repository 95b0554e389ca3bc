"""Log-probabilities of chosen tokens from logits that the caller already holds, each logit read once.

z_iv   = logits_iv / temperature
logp_i = z_i,target − lse_i,   lse_i = log Σ_v exp(z_iv),   H_i = −Σ_v p_iv · log p_iv,   p_iv = exp(z_iv −
                               lse_i)
dlogits_iv = (g_i·(onehot_iv − p_iv) − gH_i·p_iv·(log p_iv + H_i)) / temperature
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from ._dispatch import (
    FLOATS,
    FLOATS_TORCH,
    INDICES,
    check_tensor,
    describe,
    launching,
    resolve_backend,
    values_checked,
)
from ._layout import compute_dtype
from ._math import FLOOR, LN2, LOG2E, NEG_INF, expm1, log2

# Rows of a PyTorch-path block: about this many elements are widened at a time, which a core's cache holds.
BLOCK_ELEMENTS = 1 << 17


@triton.jit
def row_logprob(row_ptr, target, vocab, scale, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """(logp, log₂ Σ 2^(logit·scale), entropy) of one row of logits, read once; scale = log₂e / temperature.

    The log-sum stays in base 2: the gradient subtracts it from logit·scale, and changing the base twice would cost
    it two roundings. logp is NaN where the target is no column: nothing outside the row is ever read.
    """
    total = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    peak = tl.full((), float("-inf"), tl.float32)
    offs = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        inside = start + offs < vocab
        z = tl.load(row_ptr + start + offs, mask=inside, other=NEG_INF).to(tl.float32)
        new = tl.maximum(peak, tl.max(z, 0))
        base = tl.where(new == NEG_INF, 0.0, new)  # a row of −inf alone must not give NaN here
        # Subtracted before it is scaled: of the largest logit that leaves exactly 0, where a fused multiply-add would
        # leave the product's rounding.
        moved = tl.maximum((peak - base) * scale, FLOOR)
        decay = tl.exp2(moved)
        z = (z - base) * scale
        e = tl.exp2(z)
        if ENTROPY:
            weighted = decay * (weighted + total * moved)
            weighted += tl.sum(e * tl.maximum(z, FLOOR), 0)
        total = total * decay + tl.sum(e, 0)
        peak = new
    inside = (target >= 0) & (target < vocab)
    picked = tl.load(row_ptr + tl.where(inside, target, 0)).to(tl.float32)
    log_total = log2(total)
    logp = tl.where(inside, ((picked - peak) * scale - log_total) * LN2, float("nan"))
    return logp, peak * scale + log_total, (log_total - weighted / total) * LN2


@triton.jit
def logits_logprob_kernel(
    logits_ptr, targets_ptr, logp_ptr, entropy_ptr, lse_ptr, vocab, stride, scale, ignore_index,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row; an ignored row is not read."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logp = tl.full((), 0.0, tl.float32)
    lse = tl.full((), 0.0, tl.float32)
    entropy = tl.full((), 0.0, tl.float32)
    if target != ignore_index:
        logp, lse, entropy = row_logprob(logits_ptr + row * stride, target, vocab, scale, ENTROPY, BLOCK)
    tl.store(logp_ptr + row, logp)
    tl.store(lse_ptr + row, lse)
    if ENTROPY:
        tl.store(entropy_ptr + row, entropy)


@triton.jit
def logits_gradient_kernel(
    logits_ptr, targets_ptr, logp_ptr, lse_ptr, entropy_ptr, grad_logp_ptr, grad_entropy_ptr, out_ptr,
    vocab, stride, stride_out, temperature, scale, ignore_index,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d(logits), one program a row; out may be the logits. A row without a gradient is zeroed unread."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    lse = tl.load(lse_ptr + row)
    g = tl.load(grad_logp_ptr + row)
    # g·(1 − p) of the target. logp is exact near 0; z − lse is as far off as the rounding of two large numbers.
    missing = -g * expm1(tl.load(logp_ptr + row))
    ge = tl.full((), 0.0, tl.float32)
    entropy = ge
    if ENTROPY:
        ge = tl.load(grad_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    out = out_ptr + row * stride_out
    if (target == ignore_index) | ((g == 0) & (ge == 0)):
        for start in range(0, vocab, BLOCK):
            zeros = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
            tl.store(out + start + offs, zeros, mask=start + offs < vocab)
    else:
        for start in range(0, vocab, BLOCK):
            inside = start + offs < vocab
            z = tl.load(logits_ptr + row * stride + start + offs, mask=inside, other=NEG_INF).to(tl.float32)
            log_p = z * scale - lse
            p = tl.exp2(log_p)
            d = tl.where(start + offs == target, missing, p * -g)
            if ENTROPY:
                d -= p * ge * (tl.maximum(log_p, FLOOR) * LN2 + entropy)
            tl.store(out + start + offs, (d / temperature).to(out_ptr.dtype.element_ty), mask=inside)


def dense_rows(x: Tensor) -> Tensor:
    """x [N, V], or a copy where a row's elements are no neighbours."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _forward_triton(logits, targets, temperature, ignore_index, entropy) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse); the lse in base 2, as `_backward_triton` takes it (the PyTorch path's is natural)."""
    (n, vocab), device = logits.shape, logits.device
    logp, lse = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(2))
    row_entropy = torch.empty(n if entropy else 0, dtype=torch.float32, device=device)
    if n:
        logits = dense_rows(logits)
        with launching("logits_logprob", device):
            logits_logprob_kernel[(n,)](
                logits, targets.contiguous(), logp, row_entropy, lse, vocab, logits.stride(0),
                LOG2E.value / temperature, ignore_index, ENTROPY=entropy, **tiles.row_block(vocab),
            )  # fmt: skip
    return logp, row_entropy, lse


def _backward_triton(logits, targets, temperature, ignore_index, logp, lse, entropy, g, ge, out: Tensor) -> Tensor:
    n, vocab = logits.shape
    g = torch.zeros_like(lse) if g is None else g.contiguous()
    if n:
        logits = dense_rows(logits)
        with launching("logits_gradient", logits.device):
            logits_gradient_kernel[(n,)](
                logits, targets.contiguous(), logp, lse, entropy, g, g if ge is None else ge.contiguous(), out,
                vocab, logits.stride(0), out.stride(0), temperature, LOG2E.value / temperature, ignore_index,
                ENTROPY=ge is not None, **tiles.row_block(vocab),
            )  # fmt: skip
    return out


def _blocks(logits: Tensor):
    step = max(1, BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        yield slice(start, start + step)


def _inside(targets: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """(whether each target is a column, the column, 0 where it is none)."""
    inside = (targets >= 0) & (targets < vocab)
    return inside, torch.where(inside, targets, 0).long()


def _forward_torch(logits, targets, temperature, ignore_index, entropy) -> tuple[Tensor, Tensor, Tensor]:
    (n, vocab), dtype = logits.shape, compute_dtype(logits)
    logp, lse = logits.new_empty(n, dtype=dtype), logits.new_empty(n, dtype=dtype)
    rows_entropy = logits.new_empty(n if entropy else 0, dtype=dtype)
    inside, at = _inside(targets, vocab)
    for rows in _blocks(logits):
        z = logits[rows].to(dtype)
        if temperature != 1.0:
            z = z / temperature
        log_p = torch.log_softmax(z, 1)
        logp[rows] = log_p.gather(1, at[rows, None])[:, 0]
        # The log-sum-exp leaves by the largest logit, where the subtraction loses least.
        lse[rows] = z.amax(1) - log_p.amax(1)
        if entropy:
            rows_entropy[rows] = -(log_p.exp() * log_p.clamp_(min=FLOOR.value)).sum(1)
    ignored = targets == ignore_index
    logp.masked_fill_(~inside, torch.nan).masked_fill_(ignored, 0)
    if entropy:
        rows_entropy.masked_fill_(ignored, 0)
    return logp, rows_entropy, lse


def _backward_torch(logits, targets, temperature, ignore_index, logp, lse, entropy, g, ge, out: Tensor) -> Tensor:
    dtype, vocab = compute_dtype(logits), logits.shape[1]
    ignored = targets == ignore_index
    g = torch.zeros_like(lse) if g is None else g.masked_fill(ignored, 0)
    ge = None if ge is None else ge.masked_fill(ignored, 0)
    # p − 1 of the targets. logp is exact near 0; z − lse is as far off as the rounding of two large numbers.
    at_target = -g * torch.expm1(logp)
    if ge is not None:
        at_target -= ge * logp.exp() * (logp.clamp(min=FLOOR.value) + entropy)
    inside, at = _inside(targets, vocab)
    here = inside.nonzero()[:, 0]
    factor = (-g / temperature)[:, None]
    for rows in _blocks(logits):
        z = logits[rows].to(dtype)
        if temperature != 1.0:
            z = z / temperature
        into = out[rows]
        # Where the dtypes agree z is worked on in the place of its gradient, else in its own.
        log_p = torch.sub(z, lse[rows, None], out=into if into.dtype == dtype else None)
        if ge is None:
            d = log_p.exp_().mul_(factor[rows])
        else:
            p = log_p.exp()
            coefficient = log_p.clamp_(min=FLOOR.value).add_(entropy[rows, None]).mul_(-ge[rows, None])
            d = p.mul_(coefficient.sub_(g[rows, None])).div_(temperature)
        if d.data_ptr() != into.data_ptr():
            into.copy_(d)
    out[here, at[here]] = (at_target[here] / temperature).to(out.dtype)
    # A row nobody asks about takes exactly 0, whatever it holds (padding may be NaN).
    silent = g == 0 if ge is None else (g == 0) & (ge == 0)
    out[silent] = 0
    return out


@torch.library.custom_op("rto_kernels::logits_logprob", mutates_args=())
def _logits_logprob(
    logits: Tensor, targets: Tensor, temperature: float, ignore_index: int, entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    run = _forward_triton if backend == "triton" else _forward_torch
    return run(logits, targets, temperature, ignore_index, entropy)


@_logits_logprob.register_fake
def _(logits, targets, temperature, ignore_index, entropy, backend):
    row = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits))
    return row, torch.empty_like(row) if entropy else row.new_empty(0), torch.empty_like(row)


@torch.library.custom_op("rto_kernels::logits_logprob_backward", mutates_args=())
def _logits_logprob_backward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    ignore_index: int,
    logp: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    backend: str,
) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    stats = (logp, lse, entropy)
    return _gradient(logits, targets, temperature, ignore_index, *stats, grad_logp, grad_entropy, out, backend)


@_logits_logprob_backward.register_fake
def _(logits, targets, temperature, ignore_index, logp, lse, entropy, grad_logp, grad_entropy, backend):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _gradient(logits, targets, temperature, ignore_index, logp, lse, entropy, g, ge, out, backend) -> Tensor:
    """d(logits) into `out`, which may be `logits` itself: every element is read before it is written."""
    run = _backward_triton if backend == "triton" else _backward_torch
    return run(logits, targets, temperature, ignore_index, logp, lse, entropy, g, ge, out)


def _setup_context(ctx, inputs, output):
    logits, targets, *ctx.args = inputs
    logp, entropy, lse = output
    ctx.save_for_backward(logits, targets, logp, lse, entropy)
    want_entropy = inputs[4]
    ctx.mark_non_differentiable(lse, *(() if want_entropy else (entropy,)))
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_logp, grad_entropy, _):
    logits, targets, logp, lse, entropy = ctx.saved_tensors
    temperature, ignore_index, _, backend = ctx.args
    if grad_logp is None and grad_entropy is None:
        return (None,) * 6
    grad = _logits_logprob_backward(
        logits, targets, temperature, ignore_index, logp, lse, entropy, grad_logp, grad_entropy, backend
    )
    return grad, *(None,) * 5


_logits_logprob.register_autograd(_backward, setup_context=_setup_context)


class _InplaceLogprob(torch.autograd.Function):
    """The backward pass writes d(logits) over the logits: no second [N, V] tensor ever exists."""

    @staticmethod
    def forward(ctx, logits, targets, temperature, ignore_index, want_entropy, backend):
        logp, entropy, lse = _logits_logprob(logits, targets, temperature, ignore_index, want_entropy, backend)
        ctx.save_for_backward(logits, targets, logp, lse, entropy)
        ctx.set_materialize_grads(False)
        ctx.args = temperature, ignore_index, backend
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        logits, targets, logp, lse, entropy = ctx.saved_tensors
        temperature, ignore_index, backend = ctx.args
        if grad_logp is None and grad_entropy is None:
            return (None,) * 6
        # Autograd sees the version move, and refuses a second backward pass over the same logits.
        torch.autograd.graph.increment_version(logits)
        grad = _gradient(
            logits, targets, temperature, ignore_index, logp, lse, entropy, grad_logp, grad_entropy,
            logits.detach(), backend,
        )  # fmt: skip
        return grad, *(None,) * 5


def check_logits(
    name: str, logits: Tensor, targets: Tensor, ignore_index: int, backend: str, mask: Tensor | None = None
) -> None:
    """Raise ValueError unless logits are [..., V] floats and targets [...] ids into them.

    Targets may be anything outside the mask, and ignore_index inside it.
    """
    check_tensor(name, logits, dtypes=FLOATS if backend == "triton" else FLOATS_TORCH)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., V] with V > 0, got {describe(logits)}")
    shape = tuple(logits.shape[:-1])
    check_tensor(
        "targets", targets, shape=shape, expect=f"{list(shape)} like {name} without its last dimension",
        dtypes=INDICES, device=logits.device,
    )  # fmt: skip
    if values_checked(targets):
        bad = ((targets < 0) | (targets >= logits.shape[-1])) & (targets != ignore_index)
        if mask is not None:
            bad &= mask != 0
        if bool(bad.any()):
            raise ValueError(
                f"targets must be in [0, {logits.shape[-1]}) or ignore_index {ignore_index}, "
                f"got {targets[bad][:4].tolist()} in {describe(targets)}"
            )


def logprobs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`log_softmax(logits / temperature)` at each target token, and the entropy of each row if asked for.

    logits   [..., V] bf16, fp16 or fp32 (fp64 on the PyTorch path)
    targets  [...] int32 or int64; at `ignore_index` the result is 0 and the row takes no gradient
    returns  logp [...] fp32 (fp64 for fp64), and with `return_entropy` also the entropy [...]

    `inplace_backward` writes the gradient over the logits, which saves a tensor of their size: only for
    contiguous logits that nothing else reads after this call's forward pass.

    Raises ValueError for a wrong shape, dtype or device, for a DTensor, and, where values can be read without
    stalling a GPU, for a target outside the vocabulary (on a GPU: NaN); also for inplace_backward under
    torch.compile, which cannot see the overwriting, or on logits that are not contiguous.
    """
    check_tensor("logits", logits)
    backend = resolve_backend(backend, logits)
    check_logits("logits", logits, targets, ignore_index, backend)
    if not temperature > 0:
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    flat, ids = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    args = (flat, ids, float(temperature), ignore_index, return_entropy, backend)
    if inplace_backward:
        if torch.compiler.is_compiling():
            raise ValueError("inplace_backward must be False under torch.compile: it overwrites a saved tensor")
        if not logits.is_contiguous():
            raise ValueError(f"inplace_backward needs contiguous logits, got strides {logits.stride()}")
        logp, entropy = _InplaceLogprob.apply(*args)
    else:
        logp, entropy, _ = _logits_logprob(*args)
    logp = logp.reshape(targets.shape)
    return (logp, entropy.reshape(targets.shape)) if return_entropy else logp
