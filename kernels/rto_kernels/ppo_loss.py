"""The clipped PPO losses (arXiv 1707.06347, Eq. 7) with whitening, statistics and gradients in one pass.

A     = (advantage − mean)·rstd                              when whiten is given
ρ     = exp(logp − old_logp)       w = min(exp(old_logp − sampler_logp), is_cap), constant
policy_loss = Σ c·(−w·min(ρA, clip(ρ, 1 − low, 1 + high)·A)) − entropy_coef·Σ c·entropy
value_loss  = Σ c·½·max((v − R)², (v_old + clip(v − v_old, ±value_clip) − R)²)
c = 1/(tokens of the sequence · D), D the number of non-empty sequences     aggregation "sequence"
c = 1/D, D the number of tokens                                             aggregation "token"
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _layout
from ._dispatch import FLOATS, FLOATS_TORCH, check_tensor, detached, launching, resolve_backend
from ._layout import (
    arrival_counter,
    arrive_last,
    check_layout,
    compute_dtype,
    kernel_mask,
    load_inside,
    row_bounds,
)
from ._ppo_arguments import INF, Batch, PPOOptions, Settings, Tokens, Whitening
from ._token_torch import ppo_loss_torch
from .gae import WHITEN_MIN_VAR, combine_moments, whiten_moments


class PPOStats(NamedTuple):
    """Scalars on the device, weighted over tokens as the losses are: Σ c·x, with the same denominator.

    So with a global `denominator` the statistics of micro-batches (and ranks) add up to the batch's;
    `ratio_max` alone combines by max. Those whose inputs were not given are 0.
    """

    clip_low: Tensor  # share of tokens where the lower clip bound cut the gradient (A < 0, ρ < 1 − low)
    clip_high: Tensor  # share where the upper one did (A > 0, ρ > 1 + high)
    ratio_mean: Tensor
    ratio_max: Tensor
    kl_k1: Tensor  # old_logp − logp
    kl_k3: Tensor  # ρ − 1 − log ρ
    entropy: Tensor
    is_weight: Tensor  # mean of w, after the cap
    is_capped: Tensor  # share of tokens whose w was cut by is_cap
    value_clip: Tensor  # share where the clipped value gave the larger loss
    value_mean: Tensor
    return_mean: Tensor
    return_sq: Tensor  # mean of R²
    error_mean: Tensor  # mean of R − v
    error_sq: Tensor  # mean of (R − v)²

    def explained_variance(self) -> Tensor:
        """1 − Var(R − v)/Var(R), of statistics that cover a whole batch."""
        spread = (self.return_sq - self.return_mean**2).clamp(min=1e-12)
        return 1 - (self.error_sq - self.error_mean**2) / spread


N_STATS = len(PPOStats._fields)
# A sequence's partial result: units counted, policy loss, value loss, statistics; as a power of two.
COLUMNS = triton.next_power_of_2(3 + N_STATS)
RATIO_MAX = 3 + PPOStats._fields.index("ratio_max")


class PPOLoss(NamedTuple):
    """policy_loss, value_loss: scalars, fp32, differentiable; value_loss is 0 where no values were given."""

    policy_loss: Tensor
    value_loss: Tensor
    stats: PPOStats


@triton.jit(do_not_specialize=["width", "moments_rows"])
def _ppo_loss_kernel(
    logp_ptr, old_logp_ptr, advantages_ptr, values_ptr, old_values_ptr, returns_ptr, entropy_ptr, sampler_ptr,
    mean_ptr, rstd_ptr, moments_ptr, cu_ptr, mask_ptr, denominator_ptr,
    policy_loss_ptr, value_loss_ptr, unit_ptr, stats_ptr, dlogp_ptr, dvalues_ptr, dentropy_ptr,
    partials_ptr, counter_ptr,
    width, moments_rows, correction, min_var, clip_low, clip_high, value_clip, is_cap, entropy_coef,
    VALUES: tl.constexpr, VALUE_CLIP: tl.constexpr, ENTROPY: tl.constexpr, SAMPLER: tl.constexpr,
    WHITEN: tl.constexpr, BY_SEQUENCE: tl.constexpr, DENOMINATOR: tl.constexpr, GRADS: tl.constexpr,
    PACKED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, MERGE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, RATIO_MAX: tl.constexpr, N_STATS: tl.constexpr,
):  # fmt: skip
    """A program a sequence; the last one merges. Gradients leave without the 1/D, known at the end only."""
    row = tl.program_id(0)
    start, end = row_bounds(cu_ptr, row, width, PACKED)
    blocks = tl.cdiv(end - start, BLOCK)
    lane = tl.arange(0, BLOCK)

    tokens = (end - start).to(tl.int32)
    if MASKED:
        tokens = tl.full((), 0, tl.int32)
        for step in range(0, blocks):
            offs = start + step * BLOCK + lane
            tokens += tl.sum(load_inside(mask_ptr, offs, offs < end, MASKED).to(tl.int32), axis=0)
    c = tl.full((), 1.0, tl.float32)
    units = tokens.to(tl.float64)
    if BY_SEQUENCE:
        c = 1.0 / tl.maximum(tokens, 1).to(tl.float32)
        units = tl.minimum(tokens, 1).to(tl.float64)

    mean = tl.full((), 0.0, tl.float32)
    rstd = tl.full((), 1.0, tl.float32)
    if WHITEN == "given":
        mean = tl.load(mean_ptr).to(tl.float32)
        rstd = tl.load(rstd_ptr).to(tl.float32)
    if WHITEN == "moments":
        count, mean64, m2 = combine_moments(moments_ptr, moments_rows, MERGE_ROWS)
        mean = mean64.to(tl.float32)
        rstd = (1.0 / tl.sqrt(tl.maximum(m2 / tl.maximum(count - correction, 1.0), min_var))).to(tl.float32)

    none = tl.full((), 0.0, tl.float64)
    policy_sum, value_sum, low_sum, high_sum, ratio_sum, ratio_max = none, none, none, none, none, none
    k1_sum, k3_sum, entropy_sum, weight_sum, capped_sum, cut_sum = none, none, none, none, none, none
    v_sum, return_sum, return_sq_sum, error_sq_sum = none, none, none, none
    for step in range(0, blocks):
        offs = start + step * BLOCK + lane
        in_row = offs < end
        inside = load_inside(mask_ptr, offs, in_row, MASKED)
        logp = tl.load(logp_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        old = tl.load(old_logp_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        adv = tl.load(advantages_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        adv = tl.where(inside, (adv - mean) * rstd, 0.0)
        log_ratio = logp - old
        ratio = tl.exp(log_ratio)
        weight = tl.full((BLOCK,), 1.0, tl.float32)
        if SAMPLER:
            sampler = tl.load(sampler_ptr + offs, mask=inside, other=0.0).to(tl.float32)
            raw = tl.exp(old - sampler)
            weight = tl.minimum(raw, is_cap, propagate_nan=tl.PropagateNan.ALL)
            capped_sum += tl.sum((inside & (raw > is_cap)).to(tl.float32), axis=0)
        # Nothing to gain or lose: exactly 0 even where the ratio overflows, and 0·inf would be NaN.
        scale = weight * adv
        idle = scale == 0
        low = (adv < 0) & (ratio < 1 - clip_low)
        high = (adv > 0) & (ratio > 1 + clip_high)
        bounded = tl.where(low, 1 - clip_low, tl.where(high, 1 + clip_high, ratio))
        policy_sum += tl.sum(tl.where(idle, 0.0, -scale * bounded).to(tl.float64), axis=0)
        if GRADS:
            tl.store(dlogp_ptr + offs, tl.where(idle | low | high, 0.0, -scale * ratio * c), mask=in_row)
        low_sum += tl.sum(low.to(tl.float32), axis=0)
        high_sum += tl.sum(high.to(tl.float32), axis=0)
        ratio_sum += tl.sum(tl.where(inside, ratio, 0.0), axis=0)
        ratio_max = tl.maximum(ratio_max, tl.max(tl.where(inside, ratio, 0.0), axis=0))
        k1_sum += tl.sum(-log_ratio, axis=0)
        k3_sum += tl.sum(tl.where(inside, ratio - 1 - log_ratio, 0.0), axis=0)
        weight_sum += tl.sum(tl.where(inside, weight, 0.0), axis=0)

        if ENTROPY:
            entropy = tl.load(entropy_ptr + offs, mask=inside, other=0.0).to(tl.float32)
            entropy_sum += tl.sum(entropy.to(tl.float64), axis=0)
            if GRADS:
                tl.store(dentropy_ptr + offs, tl.where(inside, -entropy_coef * c, 0.0), mask=in_row)

        if VALUES:
            v = tl.load(values_ptr + offs, mask=inside, other=0.0).to(tl.float32)
            target = tl.load(returns_ptr + offs, mask=inside, other=0.0).to(tl.float32)
            error = v - target
            half = 0.5 * error * error
            slope = error
            if VALUE_CLIP:
                old_v = tl.load(old_values_ptr + offs, mask=inside, other=0.0).to(tl.float32)
                moved = v - old_v
                error_clipped = old_v + tl.minimum(tl.maximum(moved, -value_clip), value_clip) - target
                half_clipped = 0.5 * error_clipped * error_clipped
                # Inside the bounds both branches are the same value; rounding must not decide between them.
                cut = (tl.abs(moved) > value_clip) & (half_clipped > half)
                half = tl.where(cut, half_clipped, half)
                slope = tl.where(cut, 0.0, error)
                cut_sum += tl.sum(cut.to(tl.float32), axis=0)
            value_sum += tl.sum(half.to(tl.float64), axis=0)
            if GRADS:
                tl.store(dvalues_ptr + offs, slope * c, mask=in_row)
            v_sum += tl.sum(v, axis=0)
            return_sum += tl.sum(target, axis=0)
            return_sq_sum += tl.sum(target * target, axis=0)
            error_sq_sum += tl.sum(error * error, axis=0)

    weigh = c.to(tl.float64)
    if BY_SEQUENCE:
        weigh = 1.0 / tl.maximum(tokens, 1).to(tl.float64)
    part_ptr = partials_ptr + row.to(tl.int64) * COLUMNS
    tl.store(part_ptr, units)
    tl.store(part_ptr + 1, (policy_sum - entropy_coef * entropy_sum) * weigh)
    tl.store(part_ptr + 2, value_sum * weigh)
    tl.store(part_ptr + 3, low_sum * weigh)
    tl.store(part_ptr + 4, high_sum * weigh)
    tl.store(part_ptr + 5, ratio_sum * weigh)
    tl.store(part_ptr + 6, ratio_max)
    tl.store(part_ptr + 7, k1_sum * weigh)
    tl.store(part_ptr + 8, k3_sum * weigh)
    tl.store(part_ptr + 9, entropy_sum * weigh)
    tl.store(part_ptr + 10, weight_sum * weigh)
    tl.store(part_ptr + 11, capped_sum * weigh)
    tl.store(part_ptr + 12, cut_sum * weigh)
    tl.store(part_ptr + 13, v_sum * weigh)
    tl.store(part_ptr + 14, return_sum * weigh)
    tl.store(part_ptr + 15, return_sq_sum * weigh)
    tl.store(part_ptr + 16, (return_sum - v_sum) * weigh)
    tl.store(part_ptr + 17, error_sq_sum * weigh)

    if arrive_last(counter_ptr):
        programs = tl.num_programs(0)
        column = tl.arange(0, COLUMNS)
        total = tl.zeros((COLUMNS,), tl.float64)
        largest = tl.zeros((COLUMNS,), tl.float64)
        for first in range(0, programs, MERGE_ROWS):
            rows = first + tl.arange(0, MERGE_ROWS)
            at = rows.to(tl.int64)[:, None] * COLUMNS + column[None, :]
            there = (rows < programs)[:, None] & (column < 3 + N_STATS)[None, :]
            # Volatile: other programs wrote these, and this one's L1 must not answer.
            parts = tl.load(partials_ptr + at, mask=there, other=0.0, volatile=True)
            total += tl.sum(parts, axis=0)
            largest = tl.maximum(largest, tl.max(parts, axis=0))
        if DENOMINATOR:
            units_all = tl.load(denominator_ptr).to(tl.float64)
        else:
            units_all = tl.maximum(tl.sum(tl.where(column == 0, total, 0.0), axis=0), 1.0)
        unit = 1.0 / units_all
        total = tl.where(column == RATIO_MAX, largest, total * unit)
        tl.store(unit_ptr, unit.to(tl.float32))
        tl.store(policy_loss_ptr, tl.sum(tl.where(column == 1, total, 0.0), axis=0).to(tl.float32))
        tl.store(value_loss_ptr, tl.sum(tl.where(column == 2, total, 0.0), axis=0).to(tl.float32))
        tl.store(stats_ptr + column - 3, total.to(tl.float32), mask=(column >= 3) & (column < 3 + N_STATS))


@triton.jit(do_not_specialize=["n"])
def _scale_kernel(
    x_ptr, y_ptr, unit_ptr, grad_ptr, x_out_ptr, y_out_ptr, n, BOTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x (and y) times the upstream gradient over D."""
    factor = tl.load(grad_ptr).to(tl.float32) * tl.load(unit_ptr)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(x_out_ptr + offs, x * factor, mask=offs < n)
    if BOTH:
        y = tl.load(y_ptr + offs, mask=offs < n, other=0.0)
        tl.store(y_out_ptr + offs, y * factor, mask=offs < n)


def _ppo_loss_triton(
    tokens: Tokens, whitening: Whitening, batch: Batch, settings: Settings, with_grads: bool
) -> list[Tensor]:
    logp, moments, cu_seqlens = tokens.logp, whitening.moments, batch.cu_seqlens
    device = logp.device
    sequences = logp.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    stand_in = logp.contiguous()

    def given(x: Tensor | None) -> Tensor:
        return stand_in if x is None else x.contiguous()

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    scalars = [new(), new(), new(), new(N_STATS)]
    grads = [
        new(*logp.shape) if with_grads and x is not None else new(0) for x in (logp, tokens.values, tokens.entropy)
    ]
    if not sequences:
        for x in scalars:
            x.zero_()
        return [*scalars, *grads]
    whiten = "moments" if moments is not None else "none" if whitening.mean is None else "given"
    with launching("ppo_loss", device):
        _ppo_loss_kernel[(sequences,)](
            stand_in,
            *(given(x) for x in tokens[1:]),
            *(given(x) for x in (whitening.mean, whitening.rstd, moments, cu_seqlens)),
            kernel_mask(batch.mask, stand_in),
            given(batch.denominator),
            *scalars,
            *grads,
            torch.empty(sequences, COLUMNS, dtype=torch.float64, device=device),
            arrival_counter(device),
            logp.shape[-1],
            0 if moments is None else moments.shape[0],
            whitening.correction,
            WHITEN_MIN_VAR,
            settings.clip_low,
            settings.clip_high,
            settings.value_clip,
            settings.is_cap,
            settings.entropy_coef,
            VALUES=tokens.values is not None,
            VALUE_CLIP=settings.value_clip < INF,
            ENTROPY=tokens.entropy is not None,
            SAMPLER=tokens.sampler_logp is not None,
            WHITEN=whiten,
            BY_SEQUENCE=settings.aggregation == "sequence",
            DENOMINATOR=batch.denominator is not None,
            GRADS=with_grads,
            PACKED=cu_seqlens is not None,
            MASKED=batch.mask is not None,
            BLOCK=_layout.BLOCK,
            MERGE_ROWS=_layout.MERGE_ROWS,
            COLUMNS=COLUMNS,
            RATIO_MAX=RATIO_MAX,
            N_STATS=N_STATS,
            **_layout.LAUNCH,
        )
    return [*scalars, *grads]


@torch.library.custom_op("rto_kernels::ppo_loss", mutates_args=())
def _ppo_loss_op(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    sampler_logp: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    moments: Tensor | None,
    correction: int,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    denominator: Tensor | None,
    clip_low: float,
    clip_high: float,
    value_clip: float,
    is_cap: float,
    entropy_coef: float,
    aggregation: str,
    with_grads: bool,
    backend: str,
) -> list[Tensor]:
    """See `loss_and_grads`, which alone calls it."""
    tokens = Tokens(logp, old_logp, advantages, values, old_values, returns, entropy, sampler_logp)
    whitening, batch = Whitening(mean, rstd, moments, correction), Batch(cu_seqlens, mask, denominator)
    settings = Settings(clip_low, clip_high, value_clip, is_cap, entropy_coef, aggregation)
    if backend == "triton":
        return _ppo_loss_triton(tokens, whitening, batch, settings, with_grads)
    if moments is not None:
        whitening = Whitening(*whiten_moments(moments, correction=correction))
    out = ppo_loss_torch(tokens, whitening, batch, settings)
    return out if with_grads else [*out[:4], *(x.new_empty(0) for x in out[4:])]


@_ppo_loss_op.register_fake
def _(*args):
    tokens, with_grads = Tokens(*args[: len(Tokens._fields)]), args[-2]
    logp, dtype = tokens.logp, compute_dtype(*tokens)

    def new(*shape):
        return logp.new_empty(shape, dtype=dtype)

    grads = [
        new(*logp.shape) if with_grads and x is not None else new(0) for x in (logp, tokens.values, tokens.entropy)
    ]
    return [new(), new(), new(), new(N_STATS), *grads]


def loss_and_grads(
    tokens: Tokens, whitening: Whitening, batch: Batch, settings: Settings, with_grads: bool, backend: str
) -> list[Tensor]:
    """[policy_loss, value_loss, 1/D, statistics, dlogp, dvalues, dentropy]; the gradients lack the 1/D.

    What is not asked for is empty.
    """
    return _ppo_loss_op(*tokens, *whitening, *batch, *settings, with_grads, backend)


@torch.library.custom_op("rto_kernels::ppo_loss_backward", mutates_args=())
def _backward_op(
    x: Tensor, y: Tensor, unit: Tensor, grad: Tensor, x_dtype: torch.dtype, y_dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """x and y (empty where not needed) times grad·unit, in the dtypes of what they are gradients of."""
    if backend == "torch":
        return [(g * (grad * unit)).to(dtype) for g, dtype in ((x, x_dtype), (y, y_dtype))]
    outs = [torch.empty_like(g, dtype=dtype) for g, dtype in ((x, x_dtype), (y, y_dtype))]
    if x.numel():
        with launching("ppo_loss_backward", x.device):
            _scale_kernel[(triton.cdiv(x.numel(), _layout.BLOCK),)](
                x, y, unit, grad, *outs, x.numel(), BOTH=y.numel() > 0, BLOCK=_layout.BLOCK, **_layout.LAUNCH
            )
    return outs


@_backward_op.register_fake
def _(x, y, unit, grad, x_dtype, y_dtype, backend):
    return [torch.empty_like(x, dtype=x_dtype), torch.empty_like(y, dtype=y_dtype)]


class _Attach(torch.autograd.Function):
    """Gives a finished loss the gradients that came with it.

    A node for each loss, not one for both, so that the actor's and the critic's backward may run apart.
    """

    @staticmethod
    def forward(ctx, loss, unit, dx, dy, backend, x, y):
        ctx.save_for_backward(unit, dx, dy)
        ctx.backend = backend
        ctx.x_dtype, ctx.y_dtype = x.dtype, dx.dtype if y is None else y.dtype
        ctx.mark_dirty(loss)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        unit, dx, dy = ctx.saved_tensors
        gx, gy = _backward_op(dx, dy, unit, grad.contiguous(), ctx.x_dtype, ctx.y_dtype, ctx.backend)
        need_x, need_y = ctx.needs_input_grad[5:]
        return None, None, None, None, None, gx if need_x else None, gy if need_y else None


def _check_inputs(backend, logp, batch_args, cu_seqlens, mask, aggregation, denominator) -> Tensor | None:
    """Raise ValueError for what does not fit; return the denominator as a tensor on the device, or None."""
    floats = FLOATS if backend == "triton" else FLOATS_TORCH
    check_layout("logp", logp, cu_seqlens, mask)
    check_tensor("logp", logp, dtypes=floats)
    shape, device = tuple(logp.shape), logp.device
    for name, x, required in batch_args:
        if x is not None or required:
            check_tensor(name, x, shape=shape, expect=f"{list(shape)} like logp", dtypes=floats, device=device)
    if aggregation not in ("sequence", "token"):
        raise ValueError(f"aggregation must be 'sequence' or 'token', got {aggregation!r}")
    if denominator is None:
        return None
    if not isinstance(denominator, Tensor):
        if not denominator > 0:
            raise ValueError(f"denominator must be a positive count, got {denominator!r}")
        return torch.full((), float(denominator), dtype=torch.float64, device=device)
    check_tensor("denominator", denominator, device=device)
    if denominator.numel() != 1:
        raise ValueError(f"denominator must be one number, got {list(denominator.shape)}")
    return denominator.detach()


def _scalar(x: Tensor | float, like: Tensor) -> Tensor:
    """One of whiten's two numbers, as a tensor on the device of `like`."""
    if not isinstance(x, Tensor):
        return torch.full((), x, dtype=torch.float64, device=like.device)
    check_tensor("whiten", x, dtypes=FLOATS_TORCH, device=like.device)
    if x.numel() != 1:
        raise ValueError(f"whiten must be two numbers (mean, rstd), got one of shape {list(x.shape)}")
    return x.detach()


def run_ppo_loss(
    tokens: Tokens,
    whitening: Whitening,
    options: PPOOptions,
    denominator: Tensor | float | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    backend: str | None,
) -> PPOLoss:
    """`ppo_loss`, whichever way the advantages are whitened."""
    logp, values, entropy = tokens.logp, tokens.values, tokens.entropy
    backend = resolve_backend(backend, logp)
    settings = options.flat()
    clip_values = values is not None and settings.value_clip < INF
    per_token = (
        ("old_logp", tokens.old_logp, True),
        ("advantages", tokens.advantages, True),
        ("values", values, False),
        ("returns", tokens.returns, values is not None),
        ("old_values", tokens.old_values, clip_values),
        ("entropy", entropy, options.entropy_coef != 0),
        ("sampler_logp", tokens.sampler_logp, options.is_cap is not None),
    )
    denominator = _check_inputs(backend, logp, per_token, cu_seqlens, mask, options.aggregation, denominator)
    with_grads = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (logp, values, entropy))
    used = Tokens(
        logp.detach(),
        tokens.old_logp.detach(),
        tokens.advantages.detach(),
        detached(values),
        tokens.old_values.detach() if clip_values else None,
        None if values is None else tokens.returns.detach(),
        detached(entropy),
        detached(tokens.sampler_logp),
    )
    batch = Batch(cu_seqlens, mask, denominator)
    policy_loss, value_loss, unit, stats, dlogp, dvalues, dentropy = loss_and_grads(
        used, whitening, batch, settings, with_grads, backend
    )
    if with_grads:
        policy_loss = _Attach.apply(policy_loss, unit, dlogp, dentropy, backend, logp, entropy)
        if values is not None:
            none = dvalues.new_empty(0)
            value_loss = _Attach.apply(value_loss, unit, dvalues, none, backend, values, None)
    return PPOLoss(policy_loss, value_loss, PPOStats(*stats.unbind()))


def ppo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    *,
    clip: float | tuple[float | None, float | None] | None = 0.2,
    value_clip: float | None = 0.2,
    whiten: tuple[Tensor, Tensor] | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    sampler_logp: Tensor | None = None,
    is_cap: float | None = None,
    aggregation: str = "sequence",
    denominator: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> PPOLoss:
    """The clipped policy and value losses with statistics; their gradients come from the same pass.

    logp, old_logp, advantages, values, old_values, returns, entropy, sampler_logp: [B, T] with mask [B, T]
    (None: all inside), or packed [N] with cu_seqlens [B + 1]; bf16, fp16 or fp32. Gradients flow to logp,
    values and entropy.
    clip: ε, or (low, high) for 1 − low and 1 + high; value_clip likewise; a bound of 0 or None is off.
    whiten: (mean, rstd) as `whiten_moments` returns them, applied to the advantages.
    sampler_logp: log-probs under the engine that sampled; its importance weight is capped at is_cap (0, None:
    uncapped).
    aggregation: "sequence" (a sequence's token mean, then the mean over non-empty sequences: the RTO paper's)
    or "token". denominator replaces the count that the last mean divides by (a number or a device scalar):
    with the global count, losses and gradients of micro-batches sum to the batch's.
    Returns PPOLoss. A loss over no tokens is 0. Padding may hold NaN. Differentiable once.
    Sources: arXiv 1707.06347, Eq. 7; value clipping and token means as in arXiv 2404.18922's code; separate
    bounds as in arXiv 2503.14476. Raises ValueError for a shape, dtype, device or option that does not fit.
    """
    mean, rstd = (None, None) if whiten is None else (_scalar(x, logp) for x in whiten)
    tokens = Tokens(logp, old_logp, advantages, values, old_values, returns, entropy, sampler_logp)
    options = PPOOptions(clip, value_clip, is_cap, entropy_coef, aggregation)
    return run_ppo_loss(tokens, Whitening(mean, rstd), options, denominator, cu_seqlens, mask, backend)
