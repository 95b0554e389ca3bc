"""RTO's token rewards (arXiv 2404.18922, Eq. 4.7) from three models' log-probs.

dpo_reward_t = clip(beta1·(dpo_logp_t − dpo_ref_logp_t), ±dpo_clip)
kl_t         = policy_logp_t − ref_logp_t
reward_t     = dpo_reward_t − beta2·kl_t + [t is the last token]·beta3·clip(score, ±score_clip)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout
from ._dispatch import FLOATS, FLOATS_TORCH, check_tensor, launching, resolve_backend
from ._layout import check_layout, compute_dtype, kernel_mask, load_inside, row_bounds
from ._token_torch import token_rewards_torch


class TokenRewards(NamedTuple):
    """All shaped as the log-probs given, fp32, zero outside the mask, without gradient."""

    rewards: Tensor
    dpo_reward: Tensor
    kl: Tensor
    policy_logp: Tensor
    ref_logp: Tensor
    dpo_logp: Tensor


@triton.jit
def clip(x, bound):
    """x limited to ±bound, NaN kept; a bound of 0 is off."""
    low = tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(bound > 0, tl.minimum(low, bound, propagate_nan=tl.PropagateNan.ALL), x)


@triton.jit
def reward_terms(policy, ref, dpo, dpo_ref, score, is_last, beta1, beta2, beta3, dpo_clip, score_clip):
    """(reward, dpo_reward, kl) of a block. A coefficient of 0 switches its term off, even against inf."""
    dpo_reward = tl.where(beta1 == 0, 0.0, clip(beta1 * (dpo - dpo_ref), dpo_clip))
    kl = policy - ref
    reward = dpo_reward - tl.where(beta2 == 0, 0.0, beta2 * kl)
    terminal = tl.where(beta3 == 0, 0.0, beta3 * clip(score, score_clip))
    return tl.where(is_last, reward + terminal, reward), dpo_reward, kl


@triton.jit
def find_last(offs, inside, seen):
    """(where the sequence's last inside token is, whether it was seen by now); blocks come from the right."""
    rightmost = tl.max(tl.where(inside, offs, -1), axis=0)
    is_last = (offs == rightmost) & (rightmost >= 0) & (seen == 0)
    return is_last, tl.where(rightmost >= 0, 1, seen)


@triton.jit
def reward_block(
    policy_ptr, ref_ptr, dpo_ptr, dpo_ref_ptr,
    rewards_ptr, dpo_reward_ptr, kl_ptr, policy_out_ptr, ref_out_ptr, dpo_out_ptr,
    offs, in_row, inside, is_last, score, beta1, beta2, beta3, dpo_clip, score_clip,
):  # fmt: skip
    """Load a block's log-probs, store its six outputs, return its rewards (0 outside the mask)."""
    policy = tl.load(policy_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    ref = tl.load(ref_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    dpo = tl.load(dpo_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    dpo_ref = tl.load(dpo_ref_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    reward, dpo_reward, kl = reward_terms(
        policy, ref, dpo, dpo_ref, score, is_last, beta1, beta2, beta3, dpo_clip, score_clip
    )
    # Tokens outside the mask were loaded as 0, so every term is 0 there already.
    tl.store(rewards_ptr + offs, reward, mask=in_row)
    tl.store(dpo_reward_ptr + offs, dpo_reward, mask=in_row)
    tl.store(kl_ptr + offs, kl, mask=in_row)
    tl.store(policy_out_ptr + offs, policy, mask=in_row)
    tl.store(ref_out_ptr + offs, ref, mask=in_row)
    tl.store(dpo_out_ptr + offs, dpo, mask=in_row)
    return reward


@triton.jit(do_not_specialize=["width"])
def _token_rewards_kernel(
    policy_ptr, ref_ptr, dpo_ptr, dpo_ref_ptr, scores_ptr, cu_ptr, mask_ptr,
    rewards_ptr, dpo_reward_ptr, kl_ptr, policy_out_ptr, ref_out_ptr, dpo_out_ptr,
    width, beta1, beta2, beta3, dpo_clip, score_clip,
    PACKED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start, end = row_bounds(cu_ptr, row, width, PACKED)
    score = tl.load(scores_ptr + row).to(tl.float32)
    seen = 0
    blocks = tl.cdiv(end - start, BLOCK)
    for step in range(0, blocks):
        offs = start + (blocks - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        in_row = offs < end
        inside = load_inside(mask_ptr, offs, in_row, MASKED)
        is_last, seen = find_last(offs, inside, seen)
        reward_block(
            policy_ptr, ref_ptr, dpo_ptr, dpo_ref_ptr,
            rewards_ptr, dpo_reward_ptr, kl_ptr, policy_out_ptr, ref_out_ptr, dpo_out_ptr,
            offs, in_row, inside, is_last, score, beta1, beta2, beta3, dpo_clip, score_clip,
        )  # fmt: skip


def _token_rewards_triton(
    policy: Tensor,
    ref: Tensor,
    dpo: Tensor,
    dpo_ref: Tensor | None,
    scores: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    *coefficients: float,
) -> list[Tensor]:
    outs = [torch.empty(policy.shape, dtype=torch.float32, device=policy.device) for _ in range(6)]
    if scores.shape[0]:
        policy, ref, dpo, scores = (x.contiguous() for x in (policy, ref, dpo, scores))
        with launching("token_rewards", policy.device):
            _token_rewards_kernel[(scores.shape[0],)](
                policy,
                ref,
                dpo,
                ref if dpo_ref is None else dpo_ref.contiguous(),
                scores,
                policy if cu_seqlens is None else cu_seqlens.contiguous(),
                kernel_mask(mask, policy),
                *outs,
                policy.shape[-1],
                *coefficients,
                PACKED=cu_seqlens is not None,
                MASKED=mask is not None,
                BLOCK=_layout.BLOCK,
                **_layout.LAUNCH,
            )
    return outs


@torch.library.custom_op("rto_kernels::token_rewards", mutates_args=())
def _token_rewards_op(
    policy: Tensor,
    ref: Tensor,
    dpo: Tensor,
    dpo_ref: Tensor | None,
    scores: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    dpo_clip: float,
    score_clip: float,
    backend: str,
) -> list[Tensor]:
    run = _token_rewards_triton if backend == "triton" else token_rewards_torch
    return run(policy, ref, dpo, dpo_ref, scores, cu_seqlens, mask, beta1, beta2, beta3, dpo_clip, score_clip)


@_token_rewards_op.register_fake
def _(policy, ref, dpo, dpo_ref, scores, *_):
    dtype = compute_dtype(policy, ref, dpo, dpo_ref, scores)
    return [policy.new_empty(policy.shape, dtype=dtype) for _ in range(6)]


def check_reward_inputs(
    policy_logp: Tensor,
    ref_logp: Tensor,
    dpo_logp: Tensor,
    scores: Tensor,
    dpo_ref_logp: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> int:
    """Raise ValueError for a wrong shape, dtype or device; return the number of sequences."""
    floats = FLOATS if backend == "triton" else FLOATS_TORCH
    batch = check_layout("policy_logp", policy_logp, cu_seqlens, mask)
    check_tensor("policy_logp", policy_logp, dtypes=floats)
    shape, device = tuple(policy_logp.shape), policy_logp.device
    for name, x in (("ref_logp", ref_logp), ("dpo_logp", dpo_logp), ("dpo_ref_logp", dpo_ref_logp)):
        if x is not None or name != "dpo_ref_logp":
            check_tensor(name, x, shape=shape, expect=f"{list(shape)} like policy_logp", dtypes=floats, device=device)
    check_tensor("scores", scores, shape=(batch,), expect=f"[B] = [{batch}]", dtypes=floats, device=device)
    return batch


def token_rewards(
    policy_logp: Tensor,
    ref_logp: Tensor,
    dpo_logp: Tensor,
    scores: Tensor,
    *,
    beta1: float,
    beta2: float,
    beta3: float = 1.0,
    dpo_clip: float | None = 0.0,
    score_clip: float | None = 10.0,
    dpo_ref_logp: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> TokenRewards:
    """Token rewards of sampled responses. arXiv 2404.18922, Eq. 4.7; clips as in the authors' code.

    policy_logp, ref_logp, dpo_logp, dpo_ref_logp (default: ref_logp): [B, T] with mask [B, T] (None: all
    inside), or packed [N] with cu_seqlens [B + 1] (int32 or int64); bf16, fp16 or fp32. scores: [B], already
    normalised.
    The terminal reward goes to a sequence's last token inside the mask; a sequence without tokens gets none.
    dpo_clip bounds the scaled DPO term, score_clip the score; 0 or None is off.
    Returns TokenRewards, fp32, zero outside the mask; padding may hold NaN. Nothing carries a gradient.
    Raises ValueError for a shape, dtype or device that does not fit.
    """
    backend = resolve_backend(backend, policy_logp)
    check_reward_inputs(policy_logp, ref_logp, dpo_logp, scores, dpo_ref_logp, cu_seqlens, mask, backend)
    return TokenRewards(
        *_token_rewards_op(
            policy_logp.detach(),
            ref_logp.detach(),
            dpo_logp.detach(),
            None if dpo_ref_logp is None else dpo_ref_logp.detach(),
            scores.detach(),
            cu_seqlens,
            mask,
            float(beta1),
            float(beta2),
            float(beta3),
            float(dpo_clip or 0.0),
            float(score_clip or 0.0),
            backend,
        )
    )
