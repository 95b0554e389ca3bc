"""The clipped PPO policy loss straight from hidden states: log-probs, loss and gradients in one pass over the
tokens.

    logp  as in linear_logprob.py        policy_loss, c_i  as in ppo_loss.py
    g_i   = ∂policy_loss/∂logp_i         known as soon as row i's logp is: its weight c_i needs no other row
    dz_iv = g_i·(onehot_iv − p_iv) + entropy_coef·c_i·p_iv·(log p_iv + H_i)

So a chunk of tokens goes hidden → exp(z) → logp → g → d(hidden), d(weight) before the next one starts, and
three matrix products are the whole cost: nothing is computed twice and no logits outlive their chunk.

With bf16 and neither mask, bias, soft-cap nor entropy bonus the backward pass is linear_factored.py's, two vendor
products over all rows. Else it is linear_backward.py's, and rows whose g is exactly 0 (outside the mask, clipped, zero
advantage) leave before its products.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._dispatch import FLOATS_TORCH, batch_invariant, check_tensor, describe, launching, resolve_backend
from ._layout import check_layout, compute_dtype
from ._ppo_arguments import Batch, PPOOptions, Settings, Tokens, Whitening
from ._vocab_torch import Head, LinearGrads
from .linear_backward import factors
from .linear_factored import linear_backward_factored, row_shifts
from .linear_logprob import check_linear, linear_passes
from .ppo_loss import PPOStats, _check_inputs, _scalar, loss_and_grads


class LinearPPOLoss(NamedTuple):
    policy_loss: Tensor  # scalar, differentiable in hidden, weight and bias
    logp: Tensor  # shaped as targets, 0 outside the mask, without gradient
    entropy: Tensor  # likewise; [0] unless asked for
    stats: PPOStats


def token_weights(mask: Tensor, cu_seqlens: Tensor | None, aggregation: str, denominator: Tensor | None) -> Tensor:
    """c, shaped as mask: what a token's loss counts in the mean, 0 outside. The host never waits for it."""
    # Counts are integers: a floating-point cumsum is not deterministic on a GPU.
    inside = mask.long()
    if aggregation == "token":
        return inside.double() / (inside.sum().clamp(min=1) if denominator is None else denominator)
    if cu_seqlens is None:
        counts = inside.sum(1)
        per_token = counts[:, None]
    else:
        sums = torch.nn.functional.pad(inside.cumsum(0), (1, 0))[cu_seqlens.long()]
        counts = sums.diff()
        positions = torch.arange(mask.shape[0], device=mask.device)
        row = torch.searchsorted(cu_seqlens[1:].long().contiguous(), positions, right=True)
        per_token = counts[row] if counts.numel() else counts
    units = (counts > 0).sum().clamp(min=1) if denominator is None else denominator
    return inside.double() / (per_token.clamp(min=1).double() * units)


@torch.library.custom_op("rto_kernels::linear_ppo", mutates_args=())
def _linear_ppo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    sampler_logp: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    denominator: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    clip_low: float,
    clip_high: float,
    value_clip: float,
    is_cap: float,
    entropy_coef: float,
    aggregation: str,
    want_entropy: bool,
    needs: list[bool],
    by_row: bool,
    backend: str,
) -> list[Tensor]:
    """[loss, statistics, logp, entropy, d(hidden), d(weight), d(bias)]; what is not needed is [0]."""
    shape, dtype = targets.shape, compute_dtype(hidden)
    head = Head(weight, bias, temperature, softcap, by_row)
    settings = Settings(clip_low, clip_high, value_clip, is_cap, entropy_coef, aggregation)
    by_token = settings._replace(entropy_coef=0.0, aggregation="token")
    whitening = Whitening(mean, rstd)
    passes = linear_passes(backend)
    inside = targets != ignore_index
    if mask is not None:
        inside &= mask != 0
    c = None
    h, flat = hidden.reshape(-1, hidden.shape[-1]), inside.reshape(-1)
    t, old, adv = (x.reshape(-1) for x in (targets, old_logp, advantages))
    sampler = None if sampler_logp is None else sampler_logp.reshape(-1)
    n = h.shape[0]
    logp = h.new_zeros(n, dtype=dtype)
    entropy = h.new_zeros(n if want_entropy else 0, dtype=dtype)
    need_hidden, need_weight, need_bias = needs
    # A mask leaves rows out of the products, which the package's own can do and the vendor's cannot.
    factored = any(needs) and backend == "triton" and mask is None and factors(hidden, head, entropy_coef != 0)
    chunk = passes.chunk_tokens(weight.shape[0])
    # One chunk writes d(weight) in its own dtype; several add up in the compute dtype first.
    several = n > chunk or n == 0
    total = LinearGrads(
        torch.empty_like(h, memory_format=torch.contiguous_format) if need_hidden else None,
        h.new_zeros(weight.shape, dtype=dtype) if need_weight and several else None,
        h.new_zeros(weight.shape[0], dtype=dtype) if need_bias and several else None,
    )
    d_weight, d_bias = total.weight, total.bias
    one = h.new_ones((), dtype=torch.float32)
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        x, keep = h[rows], passes.chunk_dtype(h) if any(needs) else None
        if factored:
            x, shift = row_shifts(x, t[rows], head, old[rows], flat[rows])
            stats = passes.forward(x, t[rows], head, ignore_index, want_entropy, keep, row_shift=shift)
        else:
            stats = passes.forward(x, t[rows], head, ignore_index, want_entropy, keep)
        logp[rows] = torch.where(flat[rows], stats.logp, 0)
        if want_entropy:
            entropy[rows] = torch.where(flat[rows], stats.entropy, 0)
        if not any(needs):
            continue
        if c is None:  # not before the first pass: its launches would hold that up
            c = token_weights(inside, cu_seqlens, aggregation, denominator).to(dtype).reshape(-1)
        tokens = Tokens(
            logp[rows][None],
            old[rows][None],
            adv[rows][None],
            sampler_logp=None if sampler is None else sampler[rows][None],
        )
        g = loss_and_grads(tokens, whitening, Batch(None, None, one), by_token, True, backend)[4]  # without its 1/D
        # `where`: outside the mask old_logp and advantages may be NaN.
        g = torch.where(flat[rows], g[0] * c[rows], 0)
        if factored:
            into = total.hidden[rows] if need_hidden else None
            d_weight = linear_backward_factored(x, t[rows], head, stats, g, into, need_weight, total.weight)
            del stats
        else:
            ge = -entropy_coef * c[rows] if entropy_coef else None
            grads = passes.backward(x, t[rows], head, stats, g, ge, needs, total if several else None)
            if need_hidden:
                total.hidden[rows] = grads.hidden
            d_weight, d_bias = grads.weight, grads.bias
            del stats, grads  # else the next chunk's exp(z) stands beside this one's
    tokens = Tokens(
        logp.view(shape),
        old_logp,
        advantages,
        entropy=entropy.view(shape) if want_entropy else None,
        sampler_logp=sampler_logp,
    )
    batch = Batch(cu_seqlens, inside, denominator)
    loss, _, _, statistics, *_ = loss_and_grads(tokens, whitening, batch, settings, True, backend)

    def out(x: Tensor | None, like: Tensor) -> Tensor:
        return like.new_empty(0) if x is None else x.to(like.dtype).view(like.shape)

    return [
        loss, statistics, logp.view(shape), entropy.view(shape) if want_entropy else entropy,
        out(total.hidden, hidden), out(d_weight, weight), out(d_bias, weight if bias is None else bias),
    ]  # fmt: skip


@_linear_ppo.register_fake
def _(hidden, weight, bias, targets, *args):
    want_entropy, needs, *_ = args[-4:]
    new = hidden.new_empty
    dtype = compute_dtype(hidden)
    grads = (hidden, weight, bias)
    return [
        new((), dtype=dtype),
        new(len(PPOStats._fields), dtype=dtype),
        new(targets.shape, dtype=dtype),
        new(targets.shape if want_entropy else 0, dtype=dtype),
        *(new(x.shape) if need else new(0) for x, need in zip(grads, needs, strict=True)),
    ]


@triton.jit(do_not_specialize=["count"])
def scale_kernel(x_ptr, by_ptr, count, BLOCK: tl.constexpr):
    """x ·= by in place; nothing is touched where `by` is 1."""
    by = tl.load(by_ptr).to(tl.float32)
    if by == 1.0:
        return
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, step):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
        tl.store(x_ptr + at, (x * by).to(x_ptr.dtype.element_ty), mask=at < count)


def _scale(x: Tensor, by: Tensor, backend: str) -> Tensor:
    """x·by over x, of which autograd is told: a gradient of gigabytes is neither copied nor, where by is 1, read."""
    if backend == "torch" or torch.compiler.is_compiling() or x.numel() == 0:
        return x.mul_(by)
    torch.autograd.graph.increment_version(x)
    with launching("scale", x.device):
        scale_kernel[(min(1056, triton.cdiv(x.numel(), 4096)),)](x, by, x.numel(), BLOCK=4096, num_warps=8)
    return x


class _Attach(torch.autograd.Function):
    """Gives the finished loss its finished gradients, scaled in place by the upstream one.

    In place, because a second d(weight) is what this file exists to avoid; autograd sees the write and
    refuses a second backward pass over the same graph.
    """

    @staticmethod
    def forward(ctx, loss, d_hidden, d_weight, d_bias, hidden, weight, bias, backend):
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.backend = backend
        ctx.mark_dirty(loss)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # detach: a new handle on the same memory, which the caller's .grad may then keep without a copy.
        scaled = (
            _scale(x, grad, ctx.backend).detach() if need else None
            for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad[4:-1], strict=True)
        )
        return None, None, None, None, *scaled, None


def fused_linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    clip: float | tuple[float | None, float | None] | None = 0.2,
    whiten: tuple[Tensor, Tensor] | None = None,
    entropy_coef: float = 0.0,
    return_entropy: bool = False,
    sampler_logp: Tensor | None = None,
    is_cap: float | None = None,
    aggregation: str = "sequence",
    denominator: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    deterministic: str | None = None,
    backend: str | None = None,
) -> LinearPPOLoss:
    """The policy loss of `ppo_loss` over the log-probs of `token_logprobs`, with no logits and no second
    pass.

    hidden   [B, T, H], or packed [N, H] with cu_seqlens [B + 1]; bf16 or fp32, fp16 without gradients
             (fp64 on the PyTorch path)
    weight   [V, H] of hidden's dtype, bias [V]
    targets, old_logp, advantages, sampler_logp, mask   [B, T], or [N]; a target of ignore_index is outside
                                                        the mask
    The remaining arguments are those of `ppo_loss` and `token_logprobs`.

    Returns LinearPPOLoss. The gradients are computed with the loss and kept until its backward pass, which
    can run once; where no input requires a gradient only the loss is computed. d(weight) is one tensor of the
    weight's size, and an fp32 one beside it for 16-bit weights whose tokens take several chunks.
    `deterministic="batch"`, as in `token_logprobs`, is about logp and entropy.

    Raises ValueError as `token_logprobs` and `ppo_loss` do.
    """
    backend = resolve_backend(backend, hidden)
    check_tensor("hidden", hidden, dtypes=FLOATS_TORCH)
    inputs = (hidden, weight, bias)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    if any(needs) and hidden.dtype == torch.float16:
        raise ValueError(
            "hidden must have dtype bfloat16 or float32 where gradients are wanted: they are computed with the loss, "
            f"before a loss scale can reach them, and most would be 0 in float16; got {describe(hidden)}. "
            "token_logprobs followed by ppo_loss takes float16"
        )
    packed = cu_seqlens is not None
    rank = 2 if packed else 3
    if hidden.ndim != rank:
        expect = "[N, H], packed, with cu_seqlens" if packed else "[B, T, H], or [N, H] with cu_seqlens="
        check_tensor("hidden", hidden, shape=(None,) * rank, expect=expect)
    shape = tuple(hidden.shape[:-1])
    check_tensor("targets", targets, shape=shape, expect=f"{list(shape)} like hidden without its last dimension")
    flat_targets = targets.reshape(-1)
    if mask is not None:
        check_layout("targets", targets, cu_seqlens, mask)
        flat_targets = torch.where(mask.reshape(-1) != 0, flat_targets, ignore_index)
    check_linear(
        backend,
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        flat_targets,
        bias,
        temperature,
        softcap,
        ignore_index,
    )
    given = [("old_logp", old_logp, True), ("advantages", advantages, True)]
    given.append(("sampler_logp", sampler_logp, is_cap is not None))
    like_logp = old_logp if isinstance(old_logp, Tensor) else advantages
    check_tensor("old_logp", like_logp, shape=shape, expect=f"{list(shape)} like targets")
    denominator = _check_inputs(backend, like_logp, given, cu_seqlens, mask, aggregation, denominator)
    mean, rstd = (None, None) if whiten is None else (_scalar(x, hidden) for x in whiten)
    options = PPOOptions(clip, None, is_cap, entropy_coef, aggregation)
    loss, stats, logp, entropy, *grads = _linear_ppo(
        *(None if x is None else x.detach() for x in inputs),
        targets,
        old_logp.detach(),
        advantages.detach(),
        None if sampler_logp is None else sampler_logp.detach(),
        mean,
        rstd,
        cu_seqlens,
        mask,
        denominator,
        float(temperature),
        float(softcap or 0.0),
        ignore_index,
        *options.flat(),
        return_entropy or entropy_coef != 0,
        needs,
        batch_invariant(deterministic),
        backend,
    )
    if any(needs):
        loss = _Attach.apply(loss, *grads, *inputs, backend)
    return LinearPPOLoss(loss, logp, entropy if return_entropy else entropy.new_empty(0), PPOStats(*stats.unbind()))
