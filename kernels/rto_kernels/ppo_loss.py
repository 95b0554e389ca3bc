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
import torch.distributed as dist
from torch import Tensor

from ._dispatch import FLOATS, FLOATS_TORCH, check_tensor, resolve_backend
from ._layout import Rows, check_layout, compute_dtype
from .gae import GAE, gae, gather_moments, whiten_moments

INF = float("inf")


class PPOStats(NamedTuple):
    """Scalars on the device, weighted over tokens exactly as the losses are: Σ c·x, with the same denominator.

    So with a global `denominator` the statistics of micro-batches (and ranks) add up to the batch's; `ratio_max`
    alone combines by max. Those whose inputs were not given are 0.
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
RATIO_MAX = PPOStats._fields.index("ratio_max")


class PPOLoss(NamedTuple):
    """policy_loss, value_loss: scalars, fp32, differentiable; value_loss is 0 where no values were given."""

    policy_loss: Tensor
    value_loss: Tensor
    stats: PPOStats


def ppo_loss_torch(
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
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    denominator: Tensor | None,
    clip_low: float,
    clip_high: float,
    value_clip: float,
    is_cap: float,
    entropy_coef: float,
    aggregation: str,
) -> list[Tensor]:
    dtype = compute_dtype(logp, old_logp, advantages, values, old_values, returns, entropy, sampler_logp)
    rows = Rows.of(logp, cu_seqlens, mask)
    lp, old, adv = (rows.take(x, dtype) for x in (logp, old_logp, advantages))
    if aggregation == "sequence":
        c = (1.0 / rows.counts.clamp(min=1).to(dtype))[rows.row]
        count = (rows.counts > 0).sum()
    else:
        c = torch.ones_like(lp)
        count = rows.counts.sum()
    per_unit = 1.0 / (count.clamp(min=1) if denominator is None else denominator).double()

    def agg(x: Tensor) -> Tensor:
        return (c * x).sum(dtype=torch.float64) * per_unit

    if mean is not None:
        adv = (adv - mean.to(dtype)) * rstd.to(dtype)
    log_ratio = lp - old
    ratio = log_ratio.exp()
    if sampler_logp is None:
        weight, capped = torch.ones_like(lp), torch.zeros_like(lp)
    else:
        weight = (old - rows.take(sampler_logp, dtype)).exp()
        capped = (weight > is_cap).to(dtype)
        weight = weight.clamp(max=is_cap)
    # Nothing to gain or lose: exactly 0 even where the ratio overflows, and 0·inf would be NaN.
    scale = weight * adv
    idle = scale == 0
    low = (adv < 0) & (ratio < 1 - clip_low)
    high = (adv > 0) & (ratio > 1 + clip_high)
    bounded = torch.where(low, 1 - clip_low, torch.where(high, 1 + clip_high, ratio))
    policy_loss = agg(torch.where(idle, 0, -scale * bounded))
    dlogp = rows.put(c * torch.where(idle | low | high, 0, -scale * ratio), logp)

    zero = policy_loss.new_zeros(())
    mean_entropy, dentropy = zero, lp.new_zeros(0)
    if entropy is not None:
        mean_entropy = agg(rows.take(entropy, dtype))
        dentropy = rows.put(-entropy_coef * c, logp)
        if entropy_coef:
            policy_loss = policy_loss - entropy_coef * mean_entropy

    value_loss, value_stats, dvalues = zero, [zero] * 6, lp.new_zeros(0)
    if values is not None:
        v, target = rows.take(values, dtype), rows.take(returns, dtype)
        error = v - target
        half, cut = 0.5 * error.square(), torch.zeros_like(v, dtype=torch.bool)
        if value_clip < INF:
            old_v = rows.take(old_values, dtype)
            moved = v - old_v
            half_clipped = 0.5 * (old_v + moved.clamp(-value_clip, value_clip) - target).square()
            # Inside the bounds both branches are the same value; rounding must not decide between them.
            cut = (moved.abs() > value_clip) & (half_clipped > half)
            half = torch.where(cut, half_clipped, half)
        value_loss = agg(half)
        dvalues = rows.put(c * torch.where(cut, 0, error), logp)
        value_stats = [agg(x) for x in (cut.to(dtype), v, target, target.square(), -error, error.square())]

    stats = [
        agg(low.to(dtype)),
        agg(high.to(dtype)),
        agg(ratio),
        ratio.max().double() if ratio.numel() else zero,
        agg(-log_ratio),
        agg(ratio - 1 - log_ratio),
        mean_entropy,
        agg(weight),
        agg(capped),
        *value_stats,
    ]
    losses = torch.stack([policy_loss, value_loss, per_unit]).to(dtype)
    return [losses, torch.stack(stats).to(dtype), dlogp, dvalues, dentropy]


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
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    denominator: Tensor | None,
    clip_low: float,
    clip_high: float,
    value_clip: float,
    is_cap: float,
    entropy_coef: float,
    aggregation: str,
    correction: int,
    backend: str,
) -> list[Tensor]:
    """[losses [3], stats, dlogp, dvalues, dentropy]; losses holds (policy, value, 1/D), gradients lack the 1/D.

    The whitening comes as (mean, rstd), or as moments [R, 3] still to be merged.
    """
    if moments is not None:
        mean, rstd = whiten_moments(moments, correction=correction)
    return ppo_loss_torch(
        logp, old_logp, advantages, values, old_values, returns, entropy, sampler_logp, mean, rstd, cu_seqlens, mask,
        denominator, clip_low, clip_high, value_clip, is_cap, entropy_coef, aggregation,
    )  # fmt: skip


@_ppo_loss_op.register_fake
def _(logp, old_logp, advantages, values, old_values, returns, entropy, sampler_logp, *_):
    dtype = compute_dtype(logp, old_logp, advantages, values, old_values, returns, entropy, sampler_logp)

    def new(*shape):
        return logp.new_empty(shape, dtype=dtype)

    return [
        new(3),
        new(N_STATS),
        new(*logp.shape),
        new(0) if values is None else new(*logp.shape),
        new(0) if entropy is None else new(*logp.shape),
    ]


@torch.library.custom_op("rto_kernels::ppo_loss_backward", mutates_args=())
def _ppo_loss_backward_op(
    losses: Tensor,
    dlogp: Tensor,
    dvalues: Tensor,
    dentropy: Tensor,
    grad: Tensor,
    logp_dtype: torch.dtype,
    values_dtype: torch.dtype,
    entropy_dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    policy, value = (grad[:2] * losses[2]).unbind()
    return [
        (dlogp * policy).to(logp_dtype),
        (dvalues * value).to(values_dtype),
        (dentropy * policy).to(entropy_dtype),
    ]


@_ppo_loss_backward_op.register_fake
def _(losses, dlogp, dvalues, dentropy, grad, logp_dtype, values_dtype, entropy_dtype, backend):
    return [
        torch.empty_like(dlogp, dtype=logp_dtype),
        torch.empty_like(dvalues, dtype=values_dtype),
        torch.empty_like(dentropy, dtype=entropy_dtype),
    ]


def _setup_context(ctx, inputs, output):
    losses, _, dlogp, dvalues, dentropy = output
    logp, values, entropy = inputs[0], inputs[3], inputs[6]
    ctx.save_for_backward(losses, dlogp, dvalues, dentropy)
    ctx.dtypes = [logp.dtype if x is None else x.dtype for x in (logp, values, entropy)]
    ctx.given = (True, values is not None, entropy is not None)
    ctx.backend = inputs[-1]
    ctx.set_materialize_grads(False)  # only the losses have a gradient; no zeros for the other outputs


def _backward(ctx, grads):
    # An operator without a formula of its own, so that a second derivative raises instead of being wrong.
    if grads[0] is None:
        return (None,) * 22
    dlogp, dvalues, dentropy = _ppo_loss_backward_op(*ctx.saved_tensors, grads[0], *ctx.dtypes, ctx.backend)
    out = [None] * 22
    out[0] = dlogp
    out[3] = dvalues if ctx.given[1] else None
    out[6] = dentropy if ctx.given[2] else None
    return tuple(out)


_ppo_loss_op.register_autograd(_backward, setup_context=_setup_context)


def _bounds(name: str, clip: float | tuple[float | None, float | None] | None) -> tuple[float, float]:
    low, high = clip if isinstance(clip, tuple | list) else (clip, clip)
    if any(bound is not None and bound < 0 for bound in (low, high)):
        raise ValueError(f"{name} must not be negative, got {clip!r}")
    return float(low or INF), float(high or INF)


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
        return torch.full((), float(denominator), dtype=torch.float32, device=device)
    check_tensor("denominator", denominator, device=device)
    if denominator.numel() != 1:
        raise ValueError(f"denominator must be one number, got {list(denominator.shape)}")
    return denominator.detach()


def _scalar(x: Tensor | float, like: Tensor) -> Tensor:
    return x.detach() if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=like.device)


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _ppo_loss(
    logp, old_logp, advantages, values, old_values, returns, mean, rstd, moments, correction, clip, value_clip,
    entropy, entropy_coef, sampler_logp, is_cap, aggregation, denominator, cu_seqlens, mask, backend,
) -> PPOLoss:  # fmt: skip
    backend = resolve_backend(backend, logp)
    bound = _bounds("value_clip", value_clip)[0]
    per_token = (
        ("old_logp", old_logp, True),
        ("advantages", advantages, True),
        ("values", values, False),
        ("returns", returns, values is not None),
        ("old_values", old_values, values is not None and bound < INF),
        ("entropy", entropy, entropy_coef != 0),
        ("sampler_logp", sampler_logp, is_cap is not None),
    )
    denominator = _check_inputs(backend, logp, per_token, cu_seqlens, mask, aggregation, denominator)
    losses, stats, *_ = _ppo_loss_op(
        logp,
        old_logp.detach(),
        advantages.detach(),
        values,
        None if values is None else _detached(old_values),
        None if values is None else returns.detach(),
        entropy,
        _detached(sampler_logp),
        mean,
        rstd,
        moments,
        cu_seqlens,
        mask,
        denominator,
        *_bounds("clip", clip),
        bound,
        float(is_cap or INF),
        float(entropy_coef),
        aggregation,
        correction,
        backend,
    )
    return PPOLoss(losses[0], losses[1], PPOStats(*stats.detach().unbind()))


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

    logp, old_logp, advantages, values, old_values, returns, entropy, sampler_logp: [B, T] with mask [B, T] (None: all
    inside), or packed [N] with cu_seqlens [B + 1]; bf16, fp16 or fp32. Gradients flow to logp, values and entropy.
    clip: ε, or (low, high) for 1 − low and 1 + high; value_clip likewise; a bound of 0 or None is off.
    whiten: (mean, rstd) as `whiten_moments` returns them, applied to the advantages.
    sampler_logp: log-probs under the engine that sampled; its importance weight is capped at is_cap (0, None: uncapped).
    aggregation: "sequence" (a sequence's token mean, then the mean over non-empty sequences: the RTO paper's) or
    "token". denominator replaces the count that the last mean divides by (a number or a device scalar): with the
    global count, losses and gradients of micro-batches sum to the batch's.
    Returns PPOLoss. A loss over no tokens is 0. Padding may hold NaN. Differentiable once.
    Sources: arXiv 1707.06347, Eq. 7; value clipping and token means as in arXiv 2404.18922's code; separate bounds as
    in arXiv 2503.14476. Raises ValueError for a shape, dtype, device or option that does not fit.
    """
    mean, rstd = (None, None) if whiten is None else (_scalar(x, logp) for x in whiten)
    return _ppo_loss(
        logp, old_logp, advantages, values, old_values, returns, mean, rstd, None, 0, clip, value_clip,
        entropy, entropy_coef, sampler_logp, is_cap, aggregation, denominator, cu_seqlens, mask, backend,
    )  # fmt: skip


def gae_ppo_loss(
    logp: Tensor,
    old_logp: Tensor,
    rewards: Tensor,
    old_values: Tensor,
    values: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    gaps: str = "zero",
    bootstrap: Tensor | None = None,
    whiten: bool = True,
    group: dist.ProcessGroup | None = None,
    correction: int = 0,
    clip: float | tuple[float | None, float | None] | None = 0.2,
    value_clip: float | None = 0.2,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    sampler_logp: Tensor | None = None,
    is_cap: float | None = None,
    aggregation: str = "sequence",
    denominator: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[PPOLoss, GAE]:
    """GAE, whitening and both losses with gradients in two launches: one update over a whole rollout.

    rewards and old_values (the critic's at rollout time) give advantages and returns; values, the current critic's,
    the value loss (None: no value loss). whiten over these tokens, and over the group's ranks if a group is given
    (which adds one all_gather of three numbers). The rest, layouts and errors as in `gae` and `ppo_loss`.
    Returns (PPOLoss, GAE); the advantages in GAE are not whitened.
    """
    estimate = gae(
        rewards, old_values, gamma=gamma, lam=lam, cu_seqlens=cu_seqlens, mask=mask, gaps=gaps, bootstrap=bootstrap,
        backend=backend,
    )  # fmt: skip
    moments = gather_moments(estimate.moments, group) if whiten else None
    loss = _ppo_loss(
        logp, old_logp, estimate.advantages, values, old_values, estimate.returns, None, None, moments, correction,
        clip, value_clip, entropy, entropy_coef, sampler_logp, is_cap, aggregation, denominator, cu_seqlens, mask,
        backend,
    )  # fmt: skip
    return loss, estimate
