"""verl (0.9): log-probs from logits, GAE, and the PPO policy and value losses on our kernels.

from rto_kernels.integrations import verl
verl.patch()
# in every worker process, e.g. by an `external_lib` module of verl's model config
"""

import importlib
import math
from typing import Any

import torch

from ..gae import gae, whiten_moments
from ..logits_logprob import logprobs_from_logits
from ..ppo_loss import ppo_loss
from ._swap import Swaps, bounded_logp, once, supported

FALLS_THROUGH = (
    "runs whose policy loss is not 'vanilla': GSPO, SAPO, CISPO, clip-cov, ... PPO, GRPO and RLOO runs have it unless "
    "told otherwise",
    "a vanilla policy loss or value loss over inputs that are not [batch, tokens], such as nested tensors",
    "entropy_from_logits, which a run with an entropy bonus or that logs entropy calls",
    "any: fp64 tensors, DTensors",
)

LOG_RATIO_LIMIT = 20.0

_swaps = Swaps("verl")


def _logprobs_from_logits(original: Any) -> Any:
    def logprobs(logits, labels, inplace_backward=True):
        if not supported(logits) or labels.shape != logits.shape[:-1]:
            return original(logits, labels, inplace_backward)
        # On a CPU verl never overwrites the logits, and callers there do not expect it.
        inplace = inplace_backward and logits.is_cuda and logits.is_contiguous()
        inplace = inplace and not torch.compiler.is_compiling()
        return logprobs_from_logits(logits, labels, inplace_backward=inplace)

    return logprobs


def _compute_gae_advantage_return(original: Any) -> Any:
    def compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam):
        if not supported(token_level_rewards, values) or values.ndim != 2:
            return original(token_level_rewards, values, response_mask, gamma, lam)
        out = gae(token_level_rewards, values, gamma=float(gamma), lam=float(lam), mask=response_mask, gaps="carry")
        mean, rstd = whiten_moments(out.moments, correction=1)
        whitened = torch.where(response_mask != 0, (out.advantages - mean) * rstd, 0)
        return whitened, out.returns

    return compute_gae_advantage_return


def _aggregation(mode, mask, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None):
    """verl's loss_agg_mode as (aggregation, denominator) of ours; None for a mode that is unknown."""
    if mode == "token-mean":
        return "token", None if batch_num_tokens is None else batch_num_tokens / dp_size
    if mode == "token-sum":
        return "token", 1 / dp_size
    if mode == "seq-mean-token-mean":
        return "sequence", None if global_batch_size is None else global_batch_size / dp_size
    if mode in ("seq-mean-token-sum", "seq-mean-token-sum-norm"):
        given = global_batch_size is not None
        sequences = global_batch_size / dp_size if given else (mask.sum(-1) > 0).sum()
        norm = (loss_scale_factor or mask.shape[-1]) if mode == "seq-mean-token-sum-norm" else 1
        return "token", sequences * norm
    return None


def _masked_mean(x, mask):
    return (x * mask).sum() / (mask.sum() + 1e-8)


def _compute_policy_loss_vanilla(original: Any) -> Any:
    def compute_policy_loss_vanilla(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode="token-mean",
        config=None,
        rollout_is_weights=None,
    ):
        how = None
        if supported(old_log_prob, log_prob, advantages, rollout_is_weights) and log_prob.ndim == 2:
            how = _aggregation(loss_agg_mode, response_mask, **config.global_batch_info)
        if how is None:
            return original(
                old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
            )
        low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
        high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
        dual = config.get("clip_ratio_c", 3.0)
        bounded = bounded_logp(log_prob, old_log_prob, advantages, LOG_RATIO_LIMIT, math.log(dual))
        # A weight that is not negative commutes with the minimum, so it may scale the advantage.
        weighted = advantages if rollout_is_weights is None else advantages * rollout_is_weights
        loss = ppo_loss(
            bounded,
            old_log_prob,
            weighted,
            clip=(low, high),
            aggregation=how[0],
            denominator=how[1],
            mask=response_mask,
        ).policy_loss
        with torch.no_grad():  # verl's log: means over tokens, whatever the loss averages over
            log_ratio = (log_prob - old_log_prob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            ratio = log_ratio.exp()
            cut = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
            metrics = {
                "actor/pg_clipfrac": _masked_mean(cut, response_mask).item(),
                "actor/ppo_kl": _masked_mean(-log_ratio, response_mask).item(),
                "actor/pg_clipfrac_lower": _masked_mean((advantages < 0) & (ratio > dual), response_mask).item(),
            }
        return loss, metrics

    return compute_policy_loss_vanilla


def _compute_value_loss(original: Any) -> Any:
    def compute_value_loss(
        vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode="token-mean", **batch
    ):
        how = None
        if supported(vpreds, returns, values) and vpreds.ndim == 2:
            how = _aggregation(loss_agg_mode, response_mask, **batch)
        if how is None:
            return original(vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode, **batch)
        still = vpreds.detach()  # a policy that has not moved: only the value half is asked for
        loss = ppo_loss(
            still,
            still,
            still,
            vpreds,
            values,
            returns,
            value_clip=cliprange_value,
            aggregation=how[0],
            denominator=how[1],
            mask=response_mask,
        ).value_loss
        with torch.no_grad():
            clipped = values + (vpreds - values).clamp(-cliprange_value, cliprange_value)
            larger = (clipped - returns) ** 2 > (vpreds - returns) ** 2
        return loss, _masked_mean(larger, response_mask)

    return compute_value_loss


def _patch() -> None:
    functional = importlib.import_module("verl.utils.torch_functional")
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    _swaps.function(functional.logprobs_from_logits, _logprobs_from_logits(functional.logprobs_from_logits))
    advantage = _compute_gae_advantage_return(core.compute_gae_advantage_return)
    _swaps.function(core.compute_gae_advantage_return, advantage)
    _swaps.attribute(core.ADV_ESTIMATOR_REGISTRY, "gae", advantage)
    policy = _compute_policy_loss_vanilla(core.compute_policy_loss_vanilla)
    _swaps.function(core.compute_policy_loss_vanilla, policy)
    _swaps.attribute(core.POLICY_LOSS_REGISTRY, "vanilla", policy)
    _swaps.function(core.compute_value_loss, _compute_value_loss(core.compute_value_loss))


def patch() -> None:
    """Let verl use our functions, in this process. Raises ImportError without verl."""
    once(_patch, _swaps)


def unpatch() -> None:
    """Put verl's own functions back."""
    _swaps.undo()
