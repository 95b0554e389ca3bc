"""Every public function again, in the plainest PyTorch: the reading version, and the truth in tests.

Loops over sequences and tokens, no blocks, no fusion; autograd supplies the gradients. Everything runs in
fp32, or in fp64 where an input is fp64. Arguments mean what they mean in the public functions; those that
only choose how a result is computed (backend, save_probs, process_group, ...) are left out.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .gae import GAE
from .linear_ppo import LinearPPOLoss
from .ppo_loss import PPOLoss, PPOStats
from .token_rewards import TokenRewards


def _real(*tensors: Tensor | None) -> torch.dtype:
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def _sequences(tokens: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> list[tuple[list[int], list[int]]]:
    """For each sequence (all its positions in the flattened tokens, those inside the mask)."""
    if cu_seqlens is None:
        rows, width = tokens.shape
        bounds = [(b * width, (b + 1) * width) for b in range(rows)]
    else:
        ends = cu_seqlens.tolist()
        bounds = list(pairwise(ends))
    inside = [True] * tokens.numel() if mask is None else (mask.reshape(-1) != 0).tolist()
    return [(list(range(a, b)), [i for i in range(a, b) if inside[i]]) for a, b in bounds]


def logprobs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log_softmax(logits / temperature) at the targets; 0 where the target is ignore_index."""
    all_logp = torch.log_softmax(logits.to(_real(logits)) / temperature, dim=-1)
    ignored = targets == ignore_index
    picked = all_logp.gather(-1, targets.masked_fill(ignored, 0).long().unsqueeze(-1)).squeeze(-1)
    logp = torch.where(ignored, 0, picked)
    if not return_entropy:
        return logp
    # p·log p is 0 where p is, also in the gradient.
    finite = torch.where(all_logp == -torch.inf, 0, all_logp)
    entropy = -(all_logp.exp() * finite).sum(-1)
    return logp, torch.where(ignored, 0, entropy)


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
) -> Tensor | tuple[Tensor, ...]:
    """The logits of a linear head, soft-capped, then `logprobs_from_logits`."""
    dtype = _real(hidden, weight)
    z = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    out = logprobs_from_logits(
        z, targets, temperature=temperature, ignore_index=ignore_index, return_entropy=return_entropy
    )
    if not extras:
        return out
    z, ignored = z.detach() / temperature, targets == ignore_index
    found = {
        "mean_logits": z.mean(-1).masked_fill(ignored, 0),
        "is_top1": (z.argmax(-1) == targets) & ~ignored,
        "log_sum_sq_probs": torch.log_softmax(z, -1).mul(2).logsumexp(-1).masked_fill(ignored, 0),
    }
    return *(out if return_entropy else (out,)), *(found[name] for name in extras)


def token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
) -> Tensor:
    """sum over v of p_ref(v) * (log p_ref(v) - log p(v)), from whole logits; the reference takes no gradient."""
    dtype = _real(hidden, weight)
    z = hidden.to(dtype) @ weight.to(dtype).T
    q = ref_hidden.detach().to(dtype) @ ref_weight.detach().to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    if ref_bias is not None:
        q = q + ref_bias.detach().to(dtype)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    if ref_softcap:
        q = ref_softcap * torch.tanh(q / ref_softcap)
    log_p, log_q = z.log_softmax(-1), q.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


@torch.no_grad()
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
) -> TokenRewards:
    """arXiv 2404.18922, Eq. 4.7, token by token."""
    dtype = _real(policy_logp, ref_logp, dpo_logp, dpo_ref_logp, scores)
    base_logp = ref_logp if dpo_ref_logp is None else dpo_ref_logp
    policy, ref, dpo, base = (x.reshape(-1).to(dtype) for x in (policy_logp, ref_logp, dpo_logp, base_logp))
    outs = [torch.zeros_like(policy) for _ in range(6)]
    for row, (_, inside) in enumerate(_sequences(policy_logp, cu_seqlens, mask)):
        for i in inside:
            dpo_reward = beta1 * (dpo[i] - base[i]) if beta1 else torch.zeros((), dtype=dtype)
            if dpo_clip:
                dpo_reward = dpo_reward.clamp(-dpo_clip, dpo_clip)
            kl = policy[i] - ref[i]
            reward = dpo_reward - beta2 * kl if beta2 else dpo_reward
            if i == inside[-1] and beta3:
                score = scores[row].to(dtype)
                reward = reward + beta3 * (score.clamp(-score_clip, score_clip) if score_clip else score)
            for out, value in zip(outs, (reward, dpo_reward, kl, policy[i], ref[i], dpo[i]), strict=True):
                out[i] = value
    return TokenRewards(*(out.reshape(policy_logp.shape) for out in outs))


def logits_token_rewards(
    policy_logits: Tensor,
    ref_logits: Tensor,
    dpo_logits: Tensor,
    targets: Tensor,
    scores: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    dpo_ref_logits: Tensor | None = None,
    **rewards,
) -> TokenRewards:
    """`logprobs_from_logits` of each model, then `token_rewards`."""
    logps = [
        None if x is None else logprobs_from_logits(x, targets, temperature=temperature, ignore_index=ignore_index)
        for x in (policy_logits, ref_logits, dpo_logits, dpo_ref_logits)
    ]
    return token_rewards(*logps[:3], scores, dpo_ref_logp=logps[3], **rewards)


def fused_token_rewards(
    hiddens: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    targets: Tensor,
    scores: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    biases: tuple[Tensor | None, ...] | None = None,
    **rewards,
) -> TokenRewards:
    """`token_logprobs` of policy, reference and DPO model (a fourth: its reference), then `token_rewards`."""
    logps = [
        token_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            ignore_index=ignore_index,
        )
        for hidden, weight, bias in zip(hiddens, weights, biases or [None] * len(hiddens), strict=True)
    ]
    return token_rewards(*logps[:3], scores, dpo_ref_logp=logps[3] if len(logps) > 3 else None, **rewards)


@torch.no_grad()
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
) -> GAE:
    """arXiv 1506.02438, Eq. 16, backwards through each sequence."""
    dtype = _real(rewards, values, bootstrap)
    r, v = rewards.reshape(-1).to(dtype), values.reshape(-1).to(dtype)
    advantages, returns = torch.zeros_like(r), torch.zeros_like(r)
    zero = torch.zeros((), dtype=dtype)
    for row, (positions, inside) in enumerate(_sequences(rewards, cu_seqlens, mask)):
        after = zero if bootstrap is None else bootstrap[row].to(dtype)
        chosen = set(inside)
        next_value, advantage = after if gaps == "carry" else zero, zero
        for i in reversed(positions):
            if i not in chosen and gaps == "carry":
                continue
            if i in chosen and i == inside[-1]:
                next_value = after
            reward, value = (r[i], v[i]) if i in chosen else (zero, zero)
            advantage = reward + gamma * next_value - value + gamma * lam * advantage
            next_value = value
            if i in chosen:
                advantages[i], returns[i] = advantage, advantage + value
    taken = [i for _, inside in _sequences(rewards, cu_seqlens, mask) for i in inside]
    a = advantages[taken].double()
    mean = a.mean() if taken else a.sum()
    moments = torch.stack([a.new_tensor(len(taken)), mean, ((a - mean) ** 2).sum()])
    return GAE(advantages.reshape(rewards.shape), returns.reshape(rewards.shape), moments)


def rewards_gae(
    policy_logp: Tensor,
    ref_logp: Tensor,
    dpo_logp: Tensor,
    scores: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    gaps: str = "zero",
    bootstrap: Tensor | None = None,
    **rewards,
) -> tuple[TokenRewards, GAE]:
    """`token_rewards`, then `gae`."""
    layout = {"cu_seqlens": cu_seqlens, "mask": mask}
    tokens = token_rewards(policy_logp, ref_logp, dpo_logp, scores, **layout, **rewards)
    estimate = gae(tokens.rewards, values, gamma=gamma, lam=lam, gaps=gaps, bootstrap=bootstrap, **layout)
    return tokens, estimate


def whiten_moments(moments: Tensor, *, correction: int = 0) -> tuple[Tensor, Tensor]:
    """Chan's pairwise update, row by row of [R, 3] (or the one row [3])."""
    count, mean, m2 = torch.zeros(3, dtype=torch.float64).unbind()
    for other_count, other_mean, other_m2 in moments.reshape(-1, 3):
        if other_count == 0:
            continue
        shift, total = other_mean - mean, count + other_count
        mean = mean + shift * other_count / total
        m2 = m2 + other_m2 + shift**2 * count * other_count / total
        count = total
    variance = m2 / max(count - correction, 1)
    return mean, 1 / variance.clamp(min=1e-8).sqrt()


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
) -> PPOLoss:
    """arXiv 1707.06347, Eq. 7, and the clipped value loss, a sequence at a time."""
    tensors = (logp, old_logp, advantages, values, old_values, returns, entropy, sampler_logp)
    dtype = _real(*tensors)
    flat = [None if x is None else x.reshape(-1).to(dtype) for x in tensors]
    lp, old, adv, v, old_v, target, ent, sampler = flat
    low, high = clip if isinstance(clip, tuple | list) else (clip, clip)
    low, high = 1 - (low or torch.inf), 1 + (high or torch.inf)

    sequences = [inside for _, inside in _sequences(logp, cu_seqlens, mask) if inside]
    units = len(sequences) if aggregation == "sequence" else sum(len(inside) for inside in sequences)
    total = max(units, 1) if denominator is None else denominator
    policy_loss = lp[:0].sum()  # 0, with a gradient even where no token follows
    value_loss = lp.new_zeros(()) if v is None else v[:0].sum()
    stats = dict.fromkeys(PPOStats._fields, lp.new_zeros(()))
    for inside in sequences:
        c = 1 / (len(inside) * total) if aggregation == "sequence" else 1 / total
        a = adv[inside]
        if whiten is not None:
            a = (a - whiten[0]) * whiten[1]
        a = a.to(dtype)
        raw_weight = torch.ones_like(a) if sampler is None else (old[inside] - sampler[inside]).exp()
        weight = raw_weight.clamp(max=is_cap or torch.inf).detach()
        gain = torch.where(a == 0, 0, weight * a)
        # A token without gain costs 0 whatever its ratio; hiding it from exp keeps 0·inf out of the gradient.
        log_ratio = lp[inside] - old[inside]
        ratio = torch.where(gain == 0, 0, log_ratio).exp()
        policy_loss = policy_loss + c * -torch.minimum(ratio * gain, ratio.clamp(low, high) * gain).sum()
        seen = log_ratio.detach().exp()
        sums = {
            "clip_low": ((a < 0) & (seen < low)).to(dtype),
            "clip_high": ((a > 0) & (seen > high)).to(dtype),
            "ratio_mean": seen,
            "kl_k1": -log_ratio.detach(),
            "kl_k3": seen - 1 - log_ratio.detach(),
            "is_weight": weight,
            "is_capped": (raw_weight > (is_cap or torch.inf)).to(dtype),
        }
        if ent is not None:
            policy_loss = policy_loss - entropy_coef * c * ent[inside].sum()
            sums["entropy"] = ent[inside].detach()
        if v is not None:
            error = v[inside] - target[inside]
            half = 0.5 * error**2
            if value_clip:
                moved = (v[inside] - old_v[inside]).clamp(-value_clip, value_clip)
                half_clipped = 0.5 * (old_v[inside] + moved - target[inside]) ** 2
                out = (v[inside] - old_v[inside]).abs() > value_clip
                sums["value_clip"] = (out & (half_clipped > half)).to(dtype)
                half = torch.where(out, torch.maximum(half, half_clipped), half)
            value_loss = value_loss + c * half.sum()
            sums |= {"error_mean": -error.detach(), "error_sq": error.detach() ** 2}
            sums["value_mean"] = v[inside].detach()
            sums |= {"return_mean": target[inside], "return_sq": target[inside] ** 2}
        for name, x in sums.items():
            stats[name] = stats[name] + c * x.sum()
        stats["ratio_max"] = torch.maximum(stats["ratio_max"], seen.max())
    return PPOLoss(policy_loss, value_loss, PPOStats(**stats))


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
    correction: int = 0,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    **loss,
) -> tuple[PPOLoss, GAE]:
    """`gae`, `whiten_moments`, `ppo_loss`."""
    layout = {"cu_seqlens": cu_seqlens, "mask": mask}
    estimate = gae(rewards, old_values, gamma=gamma, lam=lam, gaps=gaps, bootstrap=bootstrap, **layout)
    moments = whiten_moments(estimate.moments, correction=correction) if whiten else None
    result = ppo_loss(
        logp,
        old_logp,
        estimate.advantages,
        values,
        old_values,
        estimate.returns,
        whiten=moments,
        **layout,
        **loss,
    )
    return result, estimate


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
    entropy_coef: float = 0.0,
    return_entropy: bool = False,
    mask: Tensor | None = None,
    **loss,
) -> LinearPPOLoss:
    """`token_logprobs`, then `ppo_loss` with its entropy bonus; ignored targets are outside the mask."""
    inside = targets != ignore_index
    if mask is not None:
        inside = inside & (mask != 0)
    seen = torch.where(inside, targets, ignore_index)
    logp, entropy = token_logprobs(
        hidden,
        weight,
        seen,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        return_entropy=True,
    )
    result = ppo_loss(
        logp, old_logp, advantages, entropy=entropy, entropy_coef=entropy_coef, mask=inside, **loss
    )  # fmt: skip
    kept = entropy.detach() if return_entropy else entropy.new_zeros(0)
    return LinearPPOLoss(result.policy_loss, logp.detach(), kept, result.stats)
