"""RTO's token rewards (arXiv 2404.18922, Eq. 4.7) from three models' log-probs.

    dpo_reward_t = clip(beta1·(dpo_logp_t − dpo_ref_logp_t), ±dpo_clip)
    kl_t         = policy_logp_t − ref_logp_t
    reward_t     = dpo_reward_t − beta2·kl_t + [t is the last token]·beta3·clip(score, ±score_clip)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import FLOATS, FLOATS_TORCH, check_tensor, resolve_backend
from ._layout import Rows, check_layout, compute_dtype


class TokenRewards(NamedTuple):
    """All shaped as the log-probs given, fp32, zero outside the mask, without gradient."""

    rewards: Tensor
    dpo_reward: Tensor
    kl: Tensor
    policy_logp: Tensor
    ref_logp: Tensor
    dpo_logp: Tensor


def token_rewards_torch(
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
) -> list[Tensor]:
    dtype = compute_dtype(policy, ref, dpo, dpo_ref, scores)
    rows = Rows.of(policy, cu_seqlens, mask)
    pi, pi_ref, pi_dpo = (rows.take(x, dtype) for x in (policy, ref, dpo))
    base = pi_ref if dpo_ref is None else rows.take(dpo_ref, dtype)
    # A coefficient of 0 switches its term off exactly, even where the log-probs are infinite.
    dpo_reward = beta1 * (pi_dpo - base) if beta1 else torch.zeros_like(pi)
    if dpo_clip:
        dpo_reward = dpo_reward.clamp(-dpo_clip, dpo_clip)
    kl = pi - pi_ref
    rewards = dpo_reward - beta2 * kl if beta2 else dpo_reward.clone()
    if beta3:
        some, last = rows.lasts
        score = scores.to(dtype)[some]
        rewards[last] += beta3 * (score.clamp(-score_clip, score_clip) if score_clip else score)
    # Fresh memory for each: an operator's output must not be one of its inputs.
    return [rows.put(x, policy).clone() for x in (rewards, dpo_reward, kl, pi, pi_ref, pi_dpo)]


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
    return token_rewards_torch(
        policy, ref, dpo, dpo_ref, scores, cu_seqlens, mask, beta1, beta2, beta3, dpo_clip, score_clip
    )


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
            check_tensor(
                name, x, shape=shape, expect=f"{list(shape)} like policy_logp", dtypes=floats, device=device
            )
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

    policy_logp, ref_logp, dpo_logp, dpo_ref_logp (default: ref_logp): [B, T] with mask [B, T] (None: all inside),
    or packed [N] with cu_seqlens [B + 1] (int32 or int64); bf16, fp16 or fp32. scores: [B], already normalised.
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
