"""Token rewards straight from three models' logits or hidden states.

    logp_m = log_softmax(logits_m / temperature)[target]      for m in policy, reference, DPO model
    rewards, dpo_reward, kl as in token_rewards.py

From logits: one launch, a program a token, each logit read once. From hidden states: the forward passes of
linear_logprob.py, whose logits never exist, and then the token rewards.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from ._dispatch import INTERPRET, check_tensor, launching, resolve_backend
from ._layout import check_layout, compute_dtype, kernel_mask
from ._math import LOG2E
from .linear_logprob import token_logprobs
from .logits_logprob import check_logits, dense_rows, logprobs_from_logits, row_logprob
from .token_rewards import TokenRewards, check_reward_inputs, reward_terms, token_rewards


@triton.jit
def _sequence_of(token, cu_ptr, batch):
    """The sequence a packed token lies in: the last one that starts at or before it."""
    low, high = 0, batch
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(cu_ptr + middle) <= token
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=["batch", "width"])
def logits_token_rewards_kernel(
    policy_ptr, ref_ptr, dpo_ptr, dpo_ref_ptr, targets_ptr, scores_ptr, cu_ptr, mask_ptr,
    rewards_ptr, dpo_reward_ptr, kl_ptr, policy_out_ptr, ref_out_ptr, dpo_out_ptr,
    batch, width, vocab, stride_policy, stride_ref, stride_dpo, stride_dpo_ref, scale, ignore_index,
    beta1, beta2, beta3, dpo_clip, score_clip,
    PACKED: tl.constexpr, MASKED: tl.constexpr, DPO_REF: tl.constexpr,
    BLOCK: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    inside = token >= 0
    if MASKED:
        inside = tl.load(mask_ptr + token) != 0
    policy = tl.full((), 0.0, tl.float32)
    ref, dpo, reward, dpo_reward, kl = policy, policy, policy, policy, policy
    if inside:
        if PACKED:
            row = _sequence_of(token, cu_ptr, batch)
            end = tl.load(cu_ptr + row + 1).to(tl.int64)
        else:
            row = token // width
            end = (row + 1) * width
        # The last token is the one with nothing inside the mask after it.
        later = 0
        if MASKED:
            for start in range(token + 1, end, LOOK):
                offs = start + tl.arange(0, LOOK)
                seen = tl.load(mask_ptr + offs, mask=offs < end, other=0) != 0
                later = tl.maximum(later, tl.max(seen.to(tl.int32), 0))
        else:
            later = tl.where(token + 1 < end, 1, 0)
        target = tl.load(targets_ptr + token)
        base = policy
        if target != ignore_index:
            policy, _, _ = row_logprob(policy_ptr + token * stride_policy, target, vocab, scale, False, BLOCK)
            ref, _, _ = row_logprob(ref_ptr + token * stride_ref, target, vocab, scale, False, BLOCK)
            dpo, _, _ = row_logprob(dpo_ptr + token * stride_dpo, target, vocab, scale, False, BLOCK)
            base = ref
            if DPO_REF:
                base, _, _ = row_logprob(dpo_ref_ptr + token * stride_dpo_ref, target, vocab, scale, False, BLOCK)
        score = tl.load(scores_ptr + row).to(tl.float32)
        reward, dpo_reward, kl = reward_terms(
            policy, ref, dpo, base, score, later == 0, beta1, beta2, beta3, dpo_clip, score_clip
        )
    tl.store(rewards_ptr + token, reward)
    tl.store(dpo_reward_ptr + token, dpo_reward)
    tl.store(kl_ptr + token, kl)
    tl.store(policy_out_ptr + token, policy)
    tl.store(ref_out_ptr + token, ref)
    tl.store(dpo_out_ptr + token, dpo)


def _rewards_triton(
    logits: Sequence[Tensor], targets, scores, cu_seqlens, mask, temperature, ignore_index, *coefficients
) -> list[Tensor]:
    """logits: of policy, reference, DPO model, and of the DPO model's reference if that is another."""
    vocab = logits[0].shape[-1]
    outs = [torch.empty(targets.shape, dtype=torch.float32, device=targets.device) for _ in range(6)]
    if targets.numel():
        rows = [dense_rows(x.reshape(-1, vocab)) for x in logits]
        rows += rows[1:2] * (4 - len(rows))
        targets, scores = targets.contiguous(), scores.contiguous()
        with launching("logits_token_rewards", targets.device):
            logits_token_rewards_kernel[(targets.numel(),)](
                *rows,
                targets,
                scores,
                targets if cu_seqlens is None else cu_seqlens.contiguous(),
                kernel_mask(mask, targets),
                *outs,
                scores.shape[0],
                targets.shape[-1],
                vocab,
                *(x.stride(0) for x in rows),
                LOG2E.value / temperature,
                ignore_index,
                *coefficients,
                PACKED=cu_seqlens is not None,
                MASKED=mask is not None,
                DPO_REF=len(logits) == 4,
                LOOK=16 if INTERPRET else 1024,
                **tiles.row_block(vocab),
            )
    return outs


@torch.library.custom_op("rto_kernels::logits_token_rewards", mutates_args=())
def _logits_token_rewards(
    logits: Sequence[Tensor],
    targets: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    ignore_index: int,
    beta1: float,
    beta2: float,
    beta3: float,
    dpo_clip: float,
    score_clip: float,
    backend: str,
) -> list[Tensor]:
    if backend == "triton":
        coefficients = beta1, beta2, beta3, dpo_clip, score_clip
        return _rewards_triton(logits, targets, scores, cu_seqlens, mask, temperature, ignore_index, *coefficients)
    chosen = _chosen(targets, mask, ignore_index)
    logps = [
        logprobs_from_logits(x, chosen, temperature=temperature, ignore_index=ignore_index, backend=backend)
        for x in logits
    ]
    return list(
        token_rewards(
            *logps[:3],
            scores,
            beta1=beta1,
            beta2=beta2,
            beta3=beta3,
            dpo_clip=dpo_clip,
            score_clip=score_clip,
            dpo_ref_logp=logps[3] if len(logps) == 4 else None,
            cu_seqlens=cu_seqlens,
            mask=mask,
            backend=backend,
        )
    )


@_logits_token_rewards.register_fake
def _(logits, targets, scores, *_):
    dtype = compute_dtype(*logits, scores)
    return [logits[0].new_empty(targets.shape, dtype=dtype) for _ in range(6)]


def _chosen(targets: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """Targets, ignore_index outside the mask: their rows are not even looked at."""
    return targets if mask is None else torch.where(mask != 0, targets, ignore_index)


def logits_token_rewards(
    policy_logits: Tensor,
    ref_logits: Tensor,
    dpo_logits: Tensor,
    targets: Tensor,
    scores: Tensor,
    *,
    beta1: float,
    beta2: float,
    beta3: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    dpo_clip: float | None = 0.0,
    score_clip: float | None = 10.0,
    dpo_ref_logits: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> TokenRewards:
    """`token_rewards` of the models' log-probs of `targets`, gathered from their logits in the same launch.

    policy_logits, ref_logits, dpo_logits  [B, T, V] with mask [B, T], or packed [N, V] with cu_seqlens [B +
                                           1]; one vocabulary, bf16, fp16 or fp32; each divided by temperature
    dpo_ref_logits                         the same of the DPO model's own reference; default: ref_logits
    targets                                [B, T] or [N], int32 or int64; anything outside the mask; at
                                           ignore_index the log-probs are 0
    scores                                 [B]
    The rest as in `token_rewards`, errors too. Returns TokenRewards, fp32, without gradient.
    """
    check_tensor("policy_logits", policy_logits)
    backend = resolve_backend(backend, policy_logits)
    check_tensor("targets", targets)
    check_layout("targets", targets, cu_seqlens, mask)
    check_logits("policy_logits", policy_logits, targets, ignore_index, backend, mask)
    logits = [policy_logits, ref_logits, dpo_logits]
    shape = tuple(policy_logits.shape)
    if dpo_ref_logits is not None:
        logits.append(dpo_ref_logits)
    for name, x in zip(("ref_logits", "dpo_logits", "dpo_ref_logits"), logits[1:], strict=False):
        check_tensor(name, x, shape=shape, expect=f"{list(shape)} like policy_logits", device=targets.device)
        check_logits(name, x, targets, ignore_index, backend, mask)
    if not temperature > 0:
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    like = torch.empty(targets.shape, dtype=torch.float32, device=targets.device)
    check_reward_inputs(like, like, like, scores, None, cu_seqlens, mask, backend)
    return TokenRewards(
        *_logits_token_rewards(
            [x.detach() for x in logits],
            targets,
            scores.detach(),
            cu_seqlens,
            mask,
            float(temperature),
            ignore_index,
            float(beta1),
            float(beta2),
            float(beta3),
            float(dpo_clip or 0.0),
            float(score_clip or 0.0),
            backend,
        )
    )


def fused_token_rewards(
    hiddens: Sequence[Tensor],
    weights: Sequence[Tensor],
    targets: Tensor,
    scores: Tensor,
    *,
    beta1: float,
    beta2: float,
    beta3: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    biases: Sequence[Tensor | None] | None = None,
    ignore_index: int = -100,
    dpo_clip: float | None = 0.0,
    score_clip: float | None = 10.0,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    deterministic: str | None = None,
    backend: str | None = None,
) -> TokenRewards:
    """`token_rewards` from hidden states of policy, reference and DPO model (a fourth: its reference), no
    logits.

    hiddens  three or four of [B, T, H_m] with mask [B, T], or packed [N, H_m] with cu_seqlens [B + 1]
    weights  as many of [V_m, H_m], biases of [V_m] or None; widths may differ, one weight may serve several
    targets  [B, T] or [N]; anything outside the mask, whose rows are not looked at
    The rest as in `token_logprobs` and `token_rewards`, errors too. Returns TokenRewards: its log-probs are
    what PPO needs as old_logp. Nothing carries a gradient.
    """
    biases = [None] * len(hiddens) if biases is None else biases
    if len(hiddens) not in (3, 4):
        raise ValueError(
            f"hiddens must be of policy, reference and DPO model, and maybe its reference, got {len(hiddens)}"
        )
    for name, x in (("weights", weights), ("biases", biases)):
        if len(x) != len(hiddens):
            raise ValueError(f"{name} must be {len(hiddens)}, as many as hiddens, got {len(x)}")
    check_tensor("targets", targets)
    check_layout("targets", targets, cu_seqlens, mask)
    chosen = _chosen(targets, mask, ignore_index).reshape(-1)
    logps = []
    for i, (hidden, weight, bias) in enumerate(zip(hiddens, weights, biases, strict=True)):
        check_tensor(
            f"hiddens[{i}]",
            hidden,
            shape=(*targets.shape, None),
            expect=f"{[*targets.shape, 'H']} like targets",
        )
        with torch.no_grad():
            logp = token_logprobs(
                hidden.reshape(-1, hidden.shape[-1]),
                weight,
                chosen,
                bias=bias,
                temperature=temperature,
                softcap=softcap,
                ignore_index=ignore_index,
                deterministic=deterministic,
                backend=backend,
            )
        logps.append(logp.reshape(targets.shape))
    return token_rewards(
        *logps[:3],
        scores,
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        dpo_clip=dpo_clip,
        score_clip=score_clip,
        dpo_ref_logp=logps[3] if len(logps) == 4 else None,
        cu_seqlens=cu_seqlens,
        mask=mask,
        backend=backend,
    )
