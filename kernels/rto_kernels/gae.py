"""Generalised advantage estimation (arXiv 1506.02438) over ragged sequences, and the moments that whiten it.

delta_t = r_t + gamma·v_{t+1} − v_t            v after the last token: 0, or bootstrap
A_t     = delta_t + gamma·lam·A_{t+1}          return_t = A_t + v_t
moments = (count, mean, M2) of A inside the mask, fp64, M2 = sum of (A − mean)²
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

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
from ._token_torch import gae_torch, token_rewards_torch
from .token_rewards import TokenRewards, check_reward_inputs, find_last, reward_block

WHITEN_MIN_VAR = 1e-8


class GAE(NamedTuple):
    """advantages, returns: shaped as the rewards, fp32, zero outside the mask; moments: fp64 [3]."""

    advantages: Tensor
    returns: Tensor
    moments: Tensor


@triton.jit
def _advance(a_right, b_right, a, b):
    """Compose x ↦ b + a·x after the map of everything to the right: the scan runs leftwards."""
    return a * a_right, b + a * b_right


@triton.jit
def _nearest(has_right, v_right, has, v):
    """The nearest inside value at or to the right of a position."""
    return has | has_right, tl.where(has != 0, v, v_right)


@triton.jit
def merge_moments(count, mean, m2, other_count, other_mean, other_m2):
    """Chan's update; a count of 0 on either side, or both, adds nothing."""
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    shift = other_mean - mean
    return total, mean + shift * share, m2 + other_m2 + shift * shift * count * share


@triton.jit
def combine_moments(parts_ptr, parts, PARTS: tl.constexpr):
    """(count, mean, M2) of `parts` rows of moments, PARTS at a time, in row order."""
    count = tl.full((), 0.0, tl.float64)
    mean = tl.full((), 0.0, tl.float64)
    m2 = tl.full((), 0.0, tl.float64)
    for first in range(0, parts, PARTS):
        at = first + tl.arange(0, PARTS)
        there = at < parts
        # Volatile: other programs wrote these, and this one's L1 must not answer.
        counts = tl.load(parts_ptr + 3 * at, mask=there, other=0.0, volatile=True)
        means = tl.load(parts_ptr + 3 * at + 1, mask=there, other=0.0, volatile=True)
        m2s = tl.load(parts_ptr + 3 * at + 2, mask=there, other=0.0, volatile=True)
        n = tl.sum(counts, axis=0)
        centre = tl.sum(counts * means, axis=0) / tl.maximum(n, 1.0)
        spread = tl.sum(m2s + counts * (means - centre) * (means - centre), axis=0)
        count, mean, m2 = merge_moments(count, mean, m2, n, centre, spread)
    return count, mean, m2


@triton.jit(do_not_specialize=["width"])
def _gae_kernel(
    policy_ptr, ref_ptr, dpo_ptr, dpo_ref_ptr, scores_ptr,
    rewards_ptr, dpo_reward_ptr, kl_ptr, policy_out_ptr, ref_out_ptr, dpo_out_ptr,
    values_ptr, bootstrap_ptr, cu_ptr, mask_ptr,
    advantages_ptr, returns_ptr, partials_ptr, moments_ptr, counter_ptr,
    width, beta1, beta2, beta3, dpo_clip, score_clip, gamma, lam,
    WITH_REWARDS: tl.constexpr, BOOTSTRAP: tl.constexpr, CARRY: tl.constexpr,
    PACKED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, MERGE_ROWS: tl.constexpr,
):  # fmt: skip
    """A program a sequence, blocks from the right; WITH_REWARDS computes the rewards, else they are read."""
    row = tl.program_id(0)
    start, end = row_bounds(cu_ptr, row, width, PACKED)
    after = tl.full((), 0.0, tl.float32)
    if BOOTSTRAP:
        after = tl.load(bootstrap_ptr + row).to(tl.float32)
    score = after
    if WITH_REWARDS:
        score = tl.load(scores_ptr + row).to(tl.float32)

    carried = tl.full((), 0.0, tl.float32)  # A of the position right of the block
    next_carried = after  # CARRY: nearest inside value right of the block
    seen = 0
    count = tl.full((), 0.0, tl.float64)
    mean = tl.full((), 0.0, tl.float64)
    m2 = tl.full((), 0.0, tl.float64)
    blocks = tl.cdiv(end - start, BLOCK)
    for step in range(0, blocks):
        lane = tl.arange(0, BLOCK)
        offs = start + (blocks - 1 - step) * BLOCK + lane
        in_row = offs < end
        inside = load_inside(mask_ptr, offs, in_row, MASKED)
        is_last, seen = find_last(offs, inside, seen)
        if WITH_REWARDS:
            r = reward_block(
                policy_ptr, ref_ptr, dpo_ptr, dpo_ref_ptr,
                rewards_ptr, dpo_reward_ptr, kl_ptr, policy_out_ptr, ref_out_ptr, dpo_out_ptr,
                offs, in_row, inside, is_last, score, beta1, beta2, beta3, dpo_clip, score_clip,
            )  # fmt: skip
        else:
            r = tl.load(rewards_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(values_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        next_inside = load_inside(mask_ptr, offs + 1, offs + 1 < end, MASKED)
        next_v = tl.load(values_ptr + offs + 1, mask=next_inside, other=0.0).to(tl.float32)

        decay = tl.full((BLOCK,), 1.0, tl.float32) * (gamma * lam)
        if CARRY:
            # A position that is skipped passes the accumulator on unchanged.
            has, near = tl.associative_scan((next_inside.to(tl.int32), next_v), 0, _nearest, reverse=True)
            next_v = tl.where(has != 0, near, next_carried)
            delta = tl.where(inside, r + gamma * next_v - v, 0.0)
            decay = tl.where(inside, decay, 1.0)
            # The next block's nearest value: this block's first inside one, or what lay beyond.
            first = tl.min(tl.where(inside, lane, BLOCK), axis=0)
            own = tl.sum(tl.where(lane == first, v, 0.0), axis=0)
            next_carried = tl.where(first < BLOCK, own, next_carried)
        else:
            next_v = tl.where(is_last, after, next_v)
            delta = r + gamma * next_v - v
        factor, adv = tl.associative_scan((decay, delta), 0, _advance, reverse=True)
        adv = adv + factor * carried
        carried = tl.sum(tl.where(lane == 0, adv, 0.0), axis=0)

        adv = tl.where(inside, adv, 0.0)
        tl.store(advantages_ptr + offs, adv, mask=in_row)
        tl.store(returns_ptr + offs, adv + v, mask=in_row)

        adv64 = adv.to(tl.float64)
        n = tl.sum(inside.to(tl.float64), axis=0)
        centre = tl.sum(adv64, axis=0) / tl.maximum(n, 1.0)
        spread = tl.where(inside, adv64 - centre, 0.0)
        count, mean, m2 = merge_moments(count, mean, m2, n, centre, tl.sum(spread * spread, axis=0))

    tl.store(partials_ptr + 3 * row, count)
    tl.store(partials_ptr + 3 * row + 1, mean)
    tl.store(partials_ptr + 3 * row + 2, m2)
    if arrive_last(counter_ptr):
        count, mean, m2 = combine_moments(partials_ptr, tl.num_programs(0), MERGE_ROWS)
        tl.store(moments_ptr, count)
        tl.store(moments_ptr + 1, mean)
        tl.store(moments_ptr + 2, m2)


def _gae_triton(
    rewards: Tensor | None,
    logps: tuple[Tensor, ...],
    scores: Tensor | None,
    coefficients: tuple[float, ...],
    values: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    gaps: str,
) -> list[Tensor]:
    """[advantages, returns, moments], after the six reward outputs where `logps` stand in for rewards."""
    device, shape = values.device, values.shape
    batch = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def new() -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    values = values.contiguous()
    if rewards is None:
        reward_outs = [new() for _ in range(6)]
        reward_args = [x.contiguous() for x in (*logps, scores)] + reward_outs
    else:
        reward_outs = []
        reward_args = [values] * 5 + [rewards.contiguous()] + [values] * 5
    # Filling with zeros would be a launch more; only where no program runs must it be done.
    moments = (torch.empty if batch else torch.zeros)(3, dtype=torch.float64, device=device)
    outs = [new(), new(), moments]
    if batch:
        with launching("gae" if rewards is not None else "rewards_gae", device):
            _gae_kernel[(batch,)](
                *reward_args,
                values,
                values if bootstrap is None else bootstrap.contiguous(),
                values if cu_seqlens is None else cu_seqlens.contiguous(),
                kernel_mask(mask, values),
                outs[0],
                outs[1],
                torch.empty(batch, 3, dtype=torch.float64, device=device),
                outs[2],
                arrival_counter(device),
                shape[-1],
                *coefficients,
                gamma,
                lam,
                WITH_REWARDS=rewards is None,
                BOOTSTRAP=bootstrap is not None,
                CARRY=gaps == "carry",
                PACKED=cu_seqlens is not None,
                MASKED=mask is not None,
                BLOCK=_layout.BLOCK,
                MERGE_ROWS=_layout.MERGE_ROWS,
                **_layout.LAUNCH,
            )
    return [*reward_outs, *outs]


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
    if backend == "triton":
        none = (0.0,) * 5
        return _gae_triton(rewards, (), None, none, values, bootstrap, cu_seqlens, mask, gamma, lam, gaps)
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
    if backend == "triton":
        logps = (policy, ref, dpo, ref if dpo_ref is None else dpo_ref)
        coefficients = (beta1, beta2, beta3, dpo_clip, score_clip)
        return _gae_triton(None, logps, scores, coefficients, values, bootstrap, cu_seqlens, mask, gamma, lam, gaps)
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
    tokens: Tensor,
    values: Tensor,
    bootstrap: Tensor | None,
    batch: int,
    gaps: str,
    floats: tuple[torch.dtype, ...],
) -> None:
    shape, device = tuple(tokens.shape), tokens.device
    check_tensor("values", values, shape=shape, expect=f"{list(shape)}, a value a token", dtypes=floats, device=device)
    if bootstrap is not None:
        check_tensor("bootstrap", bootstrap, shape=(batch,), expect=f"[B] = [{batch}]", dtypes=floats, device=device)
    if gaps not in ("zero", "carry"):
        raise ValueError(f"gaps must be 'zero' or 'carry', got {gaps!r}")


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

    rewards, values: [B, T] with mask [B, T] (None: all inside), or packed [N] with cu_seqlens [B + 1]; bf16,
    fp16 or fp32. bootstrap [B]: the value after each sequence's last token inside the mask (None: 0).
    gaps, for tokens masked out between others: "zero" zeroes r and v there and lets the recurrence run over
    them (the RTO authors' code, and OpenRLHF); "carry" skips them, keeping the next value and the accumulator
    (verl).
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
            detached(bootstrap),
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
        detached(dpo_ref_logp),
        scores.detach(),
        values.detach(),
        detached(bootstrap),
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
    """(mean, rstd), fp64 scalars on the moments' device, of all the samples that the moments describe.

    moments: fp64 [3] (count, mean, M2) as `gae` gives them, or [R, 3], merged in row order. With a process
    group the ranks' moments are gathered and merged in rank order, so that every rank holds the same bits;
    None communicates nothing. var = M2 / (count − correction), rstd = 1 / sqrt(max(var, 1e-8)). A count of 0
    adds nothing.
    Merge: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979.
    Raises ValueError unless moments is fp64 [3] or [R, 3].
    """
    check_tensor("moments", moments, dtypes=(torch.float64,))
    if moments.ndim not in (1, 2) or moments.shape[-1] != 3:
        raise ValueError(f"moments must have shape [3] or [R, 3], got {list(moments.shape)}")
    counts, means, m2s = gather_moments(moments, group).unbind(1)
    # Chan's update for R parts at once: a handful of launches whatever R, in one order on all ranks.
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    m2 = (m2s + counts * (means - mean).square()).sum()
    var = m2 / (count - correction).clamp(min=1)
    return mean, var.clamp(min=WHITEN_MIN_VAR).rsqrt()
