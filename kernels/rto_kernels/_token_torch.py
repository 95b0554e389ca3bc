"""The PyTorch path of the token-sized functions: vectorised over all tokens, linear in memory, fp32 or fp64.

Runs on any device; on CPU tensors it is what the public functions call. Equations: the files of the kernels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._layout import compute_dtype
from ._ppo_arguments import Batch, Settings, Tokens, Whitening


class Rows(NamedTuple):
    """The tokens inside the mask, in order, without the others: all a PyTorch path has to look at.

    index   [n] their positions in the flattened input, or None where every position is inside
    row     [n] the sequence each belongs to
    counts  [B] how many each sequence has
    ends    [B] where each sequence ends among the n
    """

    index: Tensor | None
    row: Tensor
    counts: Tensor
    ends: Tensor

    @staticmethod
    def of(tokens: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> "Rows":
        device = tokens.device
        if cu_seqlens is None:
            rows, width = tokens.shape
            counts = torch.full((rows,), width, device=device)
        else:
            counts = cu_seqlens.diff().long()
            rows = counts.shape[0]
        row = torch.repeat_interleave(torch.arange(rows, device=device), counts)
        index = None
        if mask is not None:
            index = (mask.reshape(-1) != 0).nonzero().squeeze(1)
            row = row[index]
            counts = torch.bincount(row, minlength=rows)
        return Rows(index, row, counts, counts.cumsum(0))

    @property
    def lasts(self) -> tuple[Tensor, Tensor]:
        """(sequences that have a token, where among the n the last token of each is)."""
        some = (self.counts > 0).nonzero().squeeze(1)
        return some, self.ends[some] - 1

    def take(self, tokens: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The inside tokens of `tokens`, flat [n], in `dtype`."""
        if tokens is None:
            return None
        flat = tokens.reshape(-1)
        return (flat if self.index is None else flat[self.index]).to(dtype)

    def put(self, inside: Tensor, like: Tensor) -> Tensor:
        """The inverse of `take`: shaped as `like`, zeros outside the mask."""
        if self.index is None:
            return inside.reshape(like.shape)
        out = inside.new_zeros(like.numel())
        out[self.index] = inside
        return out.reshape(like.shape)


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

    # A suffix sum with decay, by doubling: after the pass with step d, `adv` sums 2·d terms.
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


def ppo_loss_torch(tokens: Tokens, whitening: Whitening, batch: Batch, settings: Settings) -> list[Tensor]:
    logp, old_logp, advantages, values, old_values, returns, entropy, sampler_logp = tokens
    clip_low, clip_high, value_clip, is_cap, entropy_coef, aggregation = settings
    cu_seqlens, mask, denominator = batch
    dtype = compute_dtype(*tokens)
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

    if whitening.mean is not None:
        adv = (adv - whitening.mean.to(dtype)) * whitening.rstd.to(dtype)
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
        if value_clip < float("inf"):
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
    return [
        policy_loss.to(dtype),
        value_loss.to(dtype).clone(),
        per_unit.to(dtype),
        torch.stack(stats).to(dtype),
        dlogp,
        dvalues,
        dentropy,
    ]
