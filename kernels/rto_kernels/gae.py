"""Generalised advantage estimation (arXiv 1506.02438) over ragged sequences, and the moments that whiten it.

    delta_t = r_t + gamma·v_{t+1} − v_t            v after the last token: 0, or bootstrap
    A_t     = delta_t + gamma·lam·A_{t+1}          return_t = A_t + v_t
    moments = (count, mean, M2) of A inside the mask, fp64, M2 = sum of (A − mean)²
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._dispatch import FLOATS, FLOATS_TORCH, check_tensor, resolve_backend
from ._layout import Rows, check_layout, compute_dtype
from .token_rewards import TokenRewards, check_reward_inputs, token_rewards_torch

WHITEN_MIN_VAR = 1e-8


class GAE(NamedTuple):
    """advantages, returns: shaped as the rewards, fp32, zero outside the mask; moments: fp64 [3]."""

    advantages: Tensor
    returns: Tensor
    moments: Tensor


def gae_torch(
    rewards: Tensor,
    values: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    gaps: str,
) -> list[Tensor]:
    dtype = compute_dtype(rewards, values, bootstrap)
    inside = Rows.of(rewards, cu_seqlens, mask)
    some, last = inside.lasts
    if gaps == "zero" and inside.index is not None:
        # The recurrence runs over every position, with r and v zeroed where the mask is off.
        walk = Rows.of(rewards, cu_seqlens, None)
        r, v = (inside.put(inside.take(x, dtype), rewards).reshape(-1) for x in (rewards, values))
        last = inside.index[last]
    else:
        # "carry" skips masked positions, so it is the dense recurrence over the inside tokens alone.
        walk = inside
        r, v = (walk.take(x, dtype) for x in (rewards, values))
    next_v = torch.zeros_like(v)
    next_v[:-1] = v[1:]
    next_v[walk.lasts[1]] = 0
    if bootstrap is not None:
        next_v[last] = bootstrap.to(dtype)[some]

    # A suffix sum with decay, by doubling: after the pass with step d, `adv` sums 2·d terms of the recurrence.
    adv = r + gamma * next_v - v
    left = walk.ends[walk.row] - torch.arange(adv.shape[0], device=adv.device)
    longest, step, decay = int(walk.counts.max()) if walk.counts.numel() else 0, 1, gamma * lam
    while step < longest:
        ahead = torch.where(left[:-step] > step, adv[step:], 0)
        adv[:-step].add_(ahead, alpha=decay)
        step, decay = 2 * step, decay * decay
    returns = adv + v
    if walk is not inside:
        adv, returns = adv[inside.index], returns[inside.index]

    adv64 = adv.double()
    count = adv64.new_tensor(float(adv64.numel()))
    mean = adv64.sum() / count.clamp(min=1)
    moments = torch.stack([count, mean, (adv64 - mean).square().sum()])
    return [inside.put(adv, rewards), inside.put(returns, rewards), moments]


@torch.library.custom_op("rto_kernels::gae", mutates_args=())
def _gae_op(
    rewards: Tensor,
    values: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    gaps: str,
    backend: str,
) -> list[Tensor]:
    return gae_torch(rewards, values, bootstrap, cu_seqlens, mask, gamma, lam, gaps)


def _fake_gae(rewards, values, bootstrap):
    dtype = compute_dtype(rewards, values, bootstrap)
    shaped = [rewards.new_empty(rewards.shape, dtype=dtype) for _ in range(2)]
    return [*shaped, rewards.new_empty((3,), dtype=torch.float64)]


@_gae_op.register_fake
def _(rewards, values, bootstrap, *_):
    return _fake_gae(rewards, values, bootstrap)


@torch.library.custom_op("rto_kernels::rewards_gae", mutates_args=())
def _rewards_gae_op(
    policy: Tensor,
    ref: Tensor,
    dpo: Tensor,
    dpo_ref: Tensor | None,
    scores: Tensor,
    values: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    dpo_clip: float,
    score_clip: float,
    gamma: float,
    lam: float,
    gaps: str,
    backend: str,
) -> list[Tensor]:
    rewards = token_rewards_torch(
        policy, ref, dpo, dpo_ref, scores, cu_seqlens, mask, beta1, beta2, beta3, dpo_clip, score_clip
    )
    return [*rewards, *gae_torch(rewards[0], values, bootstrap, cu_seqlens, mask, gamma, lam, gaps)]


@_rewards_gae_op.register_fake
def _(policy, ref, dpo, dpo_ref, scores, values, bootstrap, *_):
    dtype = compute_dtype(policy, ref, dpo, dpo_ref, scores)
    rewards = [policy.new_empty(policy.shape, dtype=dtype) for _ in range(6)]
    return [*rewards, *_fake_gae(rewards[0], values, bootstrap)]


def _check_gae_inputs(
    tokens: Tensor, values: Tensor, bootstrap: Tensor | None, batch: int, gaps: str, floats: tuple[torch.dtype, ...]
) -> None:
    shape, device = tuple(tokens.shape), tokens.device
    check_tensor("values", values, shape=shape, expect=f"{list(shape)}, a value a token", dtypes=floats, device=device)
    if bootstrap is not None:
        check_tensor("bootstrap", bootstrap, shape=(batch,), expect=f"[B] = [{batch}]", dtypes=floats, device=device)
    if gaps not in ("zero", "carry"):
        raise ValueError(f"gaps must be 'zero' or 'carry', got {gaps!r}")


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    gaps: str = "zero",
    bootstrap: Tensor | None = None,
    backend: str | None = None,
) -> GAE:
    """Advantages, returns and whitening moments of ragged sequences, in one launch. arXiv 1506.02438, Eq. 16.

    rewards, values: [B, T] with mask [B, T] (None: all inside), or packed [N] with cu_seqlens [B + 1]; bf16, fp16
    or fp32. bootstrap [B]: the value after each sequence's last token inside the mask (None: 0).
    gaps, for tokens masked out between others: "zero" zeroes r and v there and lets the recurrence run over them
    (the RTO authors' code, and OpenRLHF); "carry" skips them, keeping the next value and the accumulator (verl).
    Returns GAE, fp32 and zero outside the mask; padding may hold NaN. Nothing carries a gradient.
    Raises ValueError for a shape, dtype or device that does not fit, or an unknown `gaps`.
    """
    backend = resolve_backend(backend, rewards)
    floats = FLOATS if backend == "triton" else FLOATS_TORCH
    batch = check_layout("rewards", rewards, cu_seqlens, mask)
    check_tensor("rewards", rewards, dtypes=floats)
    _check_gae_inputs(rewards, values, bootstrap, batch, gaps, floats)
    return GAE(
        *_gae_op(
            rewards.detach(),
            values.detach(),
            _detached(bootstrap),
            cu_seqlens,
            mask,
            float(gamma),
            float(lam),
            gaps,
            backend,
        )
    )


def rewards_gae(
    policy_logp: Tensor,
    ref_logp: Tensor,
    dpo_logp: Tensor,
    scores: Tensor,
    values: Tensor,
    *,
    beta1: float,
    beta2: float,
    beta3: float = 1.0,
    dpo_clip: float | None = 0.0,
    score_clip: float | None = 10.0,
    dpo_ref_logp: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    gaps: str = "zero",
    bootstrap: Tensor | None = None,
    backend: str | None = None,
) -> tuple[TokenRewards, GAE]:
    """`token_rewards` and `gae` of its rewards in one launch; arguments, layouts and errors as theirs."""
    backend = resolve_backend(backend, policy_logp)
    batch = check_reward_inputs(policy_logp, ref_logp, dpo_logp, scores, dpo_ref_logp, cu_seqlens, mask, backend)
    _check_gae_inputs(policy_logp, values, bootstrap, batch, gaps, FLOATS if backend == "triton" else FLOATS_TORCH)
    out = _rewards_gae_op(
        policy_logp.detach(),
        ref_logp.detach(),
        dpo_logp.detach(),
        _detached(dpo_ref_logp),
        scores.detach(),
        values.detach(),
        _detached(bootstrap),
        cu_seqlens,
        mask,
        float(beta1),
        float(beta2),
        float(beta3),
        float(dpo_clip or 0.0),
        float(score_clip or 0.0),
        float(gamma),
        float(lam),
        gaps,
        backend,
    )
    return TokenRewards(*out[:6]), GAE(*out[6:])


def gather_moments(moments: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[R, 3]: the given moments (R = 1, or rows already there), or every rank's in rank order."""
    moments = moments.reshape(-1, 3)
    if group is None:
        return moments
    ranks = dist.get_world_size(group)
    parts = [torch.empty_like(moments) for _ in range(ranks)]
    dist.all_gather(parts, moments.contiguous(), group=group)
    return torch.cat(parts)


def whiten_moments(
    moments: Tensor, group: dist.ProcessGroup | None = None, *, correction: int = 0
) -> tuple[Tensor, Tensor]:
    """(mean, rstd), fp64 scalars on the moments' device, of the union of all samples that the moments describe.

    moments: fp64 [3] (count, mean, M2) as `gae` gives them, or [R, 3], merged in row order. With a process group the
    ranks' moments are gathered and merged in rank order, so that every rank holds the same bits; None communicates
    nothing. var = M2 / (count − correction), rstd = 1 / sqrt(max(var, 1e-8)). A count of 0 adds nothing.
    Merge: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    Raises ValueError unless moments is fp64 [3] or [R, 3].
    """
    check_tensor("moments", moments, dtypes=(torch.float64,))
    if moments.ndim not in (1, 2) or moments.shape[-1] != 3:
        raise ValueError(f"moments must have shape [3] or [R, 3], got {list(moments.shape)}")
    counts, means, m2s = gather_moments(moments, group).unbind(1)
    # Chan's update for R parts at once: a handful of launches however many ranks, in one order on all of them.
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    m2 = (m2s + counts * (means - mean).square()).sum()
    var = m2 / (count - correction).clamp(min=1)
    return mean, var.clamp(min=WHITEN_MIN_VAR).rsqrt()
