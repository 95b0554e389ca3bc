"""The figures that an iteration logs; names are those of the report's curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from rto_kernels import PPOStats
from torch import Tensor

from rto_fast.algo.losses import OnlineStats, PairStats
from rto_fast.config import RTOConfig
from rto_fast.contract import Rollout, Scores, Targets, ragged_arange
from rto_fast.rollout.engine import SyncStats
from rto_fast.updates.ppo import UpdateStats


def not_finite(scores: Scores) -> str:
    """What in the scores is NaN or infinite, for the diagnosis; empty when nothing is."""
    names = ["score", "policy_logp", "ref_logp", "dpo_logp", "dpo_ref_logp", "values", "tokens"]
    if not scores.old_logp.isnan().all():  # else the update computes it
        names.append("old_logp")
    counts = {n: int((~torch.isfinite(getattr(scores, n))).sum()) for n in names}
    return ", ".join(f"{k} non-finite {n} values" for n, k in counts.items() if k)


def of_rollout(rollout: Rollout, scores: Scores, sources: dict[str, Tensor], min_tokens: int = 0) -> dict[str, float]:
    """min_tokens: tokens of each response that were sampled without stop ids."""
    return {
        "reward/score": float(scores.score.mean()),
        **{f"reward/{name}": float(values.mean()) for name, values in sources.items()},
        "response/length": float(rollout.response_lens.float().mean()),
        "response/truncated": float(rollout.truncated.float().mean()),
        "response/empty": float((rollout.response_lens == 0).float().mean()),
        **of_sampler(rollout, scores, min_tokens),
    }


def of_scored(
    config: RTOConfig, iteration: int, rollout: Rollout, scores: Scores, sources: dict[str, Tensor], *, lag: int
) -> dict[str, float]:
    """Of an iteration's rollout and its scores; lag: pushes since the weights that sampled it."""
    return {
        **of_rollout(rollout, scores, sources, config.min_response_length),
        "samples": (iteration + 1) * config.responses,
        "rollout/lag": lag,
        **of_tokens(config, rollout, scores),
        **(of_dropped(config, len(rollout)) if config.rollout_oversample else {}),
    }


def of_tokens(config: RTOConfig, rollout: Rollout, scores: Scores) -> dict[str, float]:
    """Of each source of token rewards beside the DPO models: the sum over a response, and the share at the bound."""
    if not config.other_token_sources:
        return {}
    found, count = {}, max(1, scores.tokens.shape[0])
    for i, (name, (spec, weight)) in enumerate(zip(source_names(config), config.other_token_sources, strict=True)):
        scaled = config.beta1 * weight * scores.tokens[:, i]
        found[f"token/{name}"] = float(scores.tokens[:, i].sum()) / len(rollout)
        if spec.against_reference:
            gap = scores.policy_logp - scores.ref_logp - scores.tokens[:, i]  # log(pi / pi_model)
            found[f"kl/{name}"] = float(gap.sum()) / len(rollout)
        if config.dpo_clip:
            found[f"token/{name}_clipped"] = float((scaled.abs() >= config.dpo_clip).sum()) / count
    return found


def source_names(config: RTOConfig) -> list[str]:
    """Names of the sources of token rewards beside the DPO models: their kinds, numbered where one comes again."""
    kinds = [spec.kind for spec, _ in config.other_token_sources]
    return [k if kinds.count(k) == 1 else f"{k}{kinds[:i].count(k)}" for i, k in enumerate(kinds)]


def of_iteration(
    seen: dict[str, float], targets: Targets, responses: int, beta2: float, learnt: dict[str, float], pushed: SyncStats
) -> dict[str, float]:
    """Of a whole iteration; seen: `of_scored` and more; learnt: of the updates' steps."""
    return seen | of_targets(targets, responses, beta2) | learnt | of_sync(pushed)


def of_dropped(config: RTOConfig, kept: int) -> dict[str, float]:
    """Responses that were begun and left out; kept: those of the rollout."""
    drawn = config.drawn_prompts * config.responses_per_prompt
    return {"rollout/dropped": float(drawn - kept), "rollout/dropped_share": (drawn - kept) / drawn}


def of_sampler(rollout: Rollout, scores: Scores, min_tokens: int = 0) -> dict[str, float]:
    """|logp_trainer - logp_sampler| where the trainer's is known; nothing where none is.

    min_tokens: tokens at the start of each response that the sampler drew without stop ids; they are left out, for
    there the two differ by the log of what the stop ids had.
    """
    gap = (scores.old_logp.cpu() - rollout.sampler_logp).abs()
    if min_tokens:
        lens = rollout.response_lens
        gap = gap[ragged_arange(torch.zeros_like(lens), lens) >= min_tokens]
    known = gap[~gap.isnan()]
    if gap.numel() and not known.numel():
        return {}
    return {
        "sampler/logp_diff_mean": float(known.mean()) if gap.numel() else 0.0,
        "sampler/logp_diff_max": float(known.max()) if gap.numel() else 0.0,
    }


def of_sync(stats: SyncStats) -> dict[str, float]:
    return {"sync/bytes": float(stats.bytes), "sync/seconds": stats.seconds}


def of_targets(targets: Targets, responses: int, beta2: float) -> dict[str, float]:
    tokens = max(1, targets.kl.numel())
    advantages = targets.advantages.double()
    return {
        "reward/total": float(targets.rewards.sum()) / responses,
        "reward/dpo": float(targets.dpo_reward.sum()) / responses,
        "reward/dense": float(targets.dense.sum()) / responses,
        "kl/response": float(targets.kl.sum()) / responses,
        "kl/token": targets.mean_kl,
        "kl/k3": float((torch.expm1(-targets.kl) + targets.kl).sum()) / tokens,
        "kl/beta2": beta2,
        "advantage/mean": float(advantages.sum()) / tokens,
        "advantage/std": float((advantages - advantages.sum() / tokens).square().sum() / tokens) ** 0.5,
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def of_policy(steps: list[UpdateStats[PPOStats]]) -> dict[str, float]:
    if not steps:
        return {}
    return {
        "policy/loss": _mean([s.loss for s in steps]),
        "policy/entropy": _mean([float(s.stats.entropy) for s in steps]),
        "policy/clip_fraction": _mean([float(s.stats.clip_low + s.stats.clip_high) for s in steps]),
        "policy/ratio_mean": _mean([float(s.stats.ratio_mean) for s in steps]),
        "policy/ratio_max": max(float(s.stats.ratio_max) for s in steps),
        "policy/kl_k3": _mean([float(s.stats.kl_k3) for s in steps]),
        "policy/grad_norm": _mean([s.result.grad_norm for s in steps]),
        "policy/lr": steps[-1].lr,
    } | of_router(steps)


def of_router(steps: Sequence[UpdateStats[Any]]) -> dict[str, float]:
    """The router's auxiliary loss, before its coefficient; nothing where it is off."""
    aux = [s.router_aux for s in steps if s.router_aux is not None]
    return {"policy/router_aux": _mean(aux)} if aux else {}


def of_sampled_policy(steps: list[UpdateStats[PPOStats]]) -> dict[str, float]:
    """As `of_policy`, of updates that correct for the sampler."""
    if not steps:
        return {}
    return of_policy(steps) | {
        "sampler/weight_mean": _mean([float(s.stats.is_weight) for s in steps]),
        "sampler/weight_clip_fraction": _mean([float(s.stats.is_capped) for s in steps]),
    }


def of_pairs(steps: list[UpdateStats[PairStats]]) -> dict[str, float]:
    """As `of_policy`, of updates from pairs."""
    return {
        "policy/loss": _mean([s.loss for s in steps]),
        "policy/clip_fraction": _mean([float(s.stats.clip_fraction) for s in steps]),
        "policy/ratio_mean": _mean([float(s.stats.ratio_mean) for s in steps]),
        "policy/ratio_max": max(float(s.stats.ratio_max) for s in steps),
        "policy/reward_gap": _mean([float(s.stats.reward_gap) for s in steps]),
        "policy/grad_norm": _mean([s.result.grad_norm for s in steps]),
        "policy/lr": steps[-1].lr,
    } | of_router(steps)


def of_online(steps: Sequence[UpdateStats[OnlineStats]]) -> dict[str, float]:
    """Of the token reward's own updates; nothing where there were none."""
    if not steps:
        return {}
    return {
        "online/loss": _mean([s.loss for s in steps]),
        "online/accuracy": _mean([float(s.stats.accuracy) for s in steps]),
        "online/logratio_max": max(float(s.stats.ratio_max) for s in steps),
        "online/grad_norm": _mean([s.result.grad_norm for s in steps]),
        "online/lr": steps[-1].lr,
    }


def of_ptx(steps: list[UpdateStats[Any]]) -> dict[str, float]:
    """Of the supervised rows beside the policy's steps; nothing where there were none."""
    losses = [s.ptx_loss for s in steps if s.ptx_loss is not None]
    return {"policy/ptx_loss": _mean(losses)} if losses else {}


def of_critic(steps: list[UpdateStats[PPOStats]]) -> dict[str, float]:
    if not steps:
        return {}
    return {
        "critic/loss": _mean([s.loss for s in steps]),
        "critic/clip_fraction": _mean([float(s.stats.value_clip) for s in steps]),
        "critic/explained_variance": _mean([float(s.stats.explained_variance()) for s in steps]),
        "critic/grad_norm": _mean([s.result.grad_norm for s in steps]),
        "critic/lr": steps[-1].lr,
    }
