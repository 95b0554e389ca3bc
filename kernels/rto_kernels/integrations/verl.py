"""verl (0.9): log-probs and entropy of logits, GAE, the policy losses of PPO, GSPO, CISPO and clip-cov, and the value
loss on our kernels.

from rto_kernels.integrations import verl
verl.patch()
# in every worker process, e.g. by an `external_lib` module of verl's model config
"""

import importlib
import inspect
import math
from typing import Any, NamedTuple

import torch

from ..gae import gae, whiten_moments
from ..logits_logprob import logprobs_from_logits
from ..ppo_loss import ppo_loss
from ._swap import Swaps, bounded_logp, once, supported

FALLS_THROUGH = (
    "runs whose policy loss is SAPO, GPG, kl-cov, geometric mean (GMPO), DRO, DPPO or the bypass mode; PPO, GRPO and "
    "RLOO runs have 'vanilla' unless told otherwise",
    "Megatron's engine: log-probs and entropy of vocabulary-parallel logits; use_fused_kernels: its own head",
    "SFT trainer: its loss is a masked sum; the log-probs under it are ours",
    "any trainer: fp64 tensors, DTensors, nested tensors (verl pads what it hands to losses)",
)

LOG_RATIO_LIMIT = 20.0
GSPO_LIMIT = 10.0

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


def _entropy(logits) -> torch.Tensor:
    return logprobs_from_logits(logits, logits.new_zeros(logits.shape[:-1], dtype=torch.int64), return_entropy=True)[1]


def _entropy_from_logits(original: Any) -> Any:
    def entropy_from_logits(logits):
        return _entropy(logits) if supported(logits) else original(logits)

    return entropy_from_logits


def _entropy_from_logits_with_chunking(original: Any) -> Any:
    def entropy_from_logits_with_chunking(logits, chunk_size=2048):
        return _entropy(logits) if supported(logits) else original(logits, chunk_size)

    return entropy_from_logits_with_chunking


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
    return torch.where(mask != 0, x, 0).sum() / (mask.sum() + 1e-8)


class _Asked(NamedTuple):
    """What a policy loss of verl's asks of ours, and the tokens that its metrics count."""

    kl: torch.Tensor
    cut: torch.Tensor
    logp: torch.Tensor | None = None  # its distance from old_logp is the ratio's logarithm
    old_logp: torch.Tensor | None = None
    lower: torch.Tensor | None = None  # None: none
    weight: torch.Tensor | None = None  # ≥ 0, of a token's loss
    linear: torch.Tensor | None = None  # in place of logp and old_logp: what the loss is the negative of


def _cut(ratio, advantages, low, high):
    """Where the clip bounds take a token's gradient."""
    return ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))


def _vanilla(old_logp, logp, advantages, mask, config, low, high) -> _Asked:
    dual = config.get("clip_ratio_c", 3.0)
    with torch.no_grad():
        log_ratio = (logp - old_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        ratio = log_ratio.exp()
    bounded = bounded_logp(logp, old_logp, advantages, LOG_RATIO_LIMIT, math.log(dual))
    lower = (advantages < 0) & (ratio > dual)
    return _Asked(-log_ratio, _cut(ratio, advantages, low, high), bounded, old_logp, lower)


def _gspo(old_logp, logp, advantages, mask, config, low, high) -> _Asked:
    """arXiv 2507.18071, GSPO-token: a sequence's mean log ratio, whose gradient is each token's own."""
    with torch.no_grad():
        log_ratio = logp - old_logp
        mean = log_ratio.where(mask != 0, 0).sum(-1) / mask.sum(-1).clamp(min=1)
    joint = (logp - logp.detach() + mean[:, None]).clamp(max=GSPO_LIMIT)
    cut = _cut(joint.detach().exp(), advantages, low, high)
    return _Asked(-log_ratio, cut, joint, torch.zeros_like(joint))


def _cispo(old_logp, logp, advantages, mask, config, low, high) -> _Asked:
    """arXiv 2506.13585: log-probs weighted by clipped ratios without gradient."""
    with torch.no_grad():
        log_ratio = (logp - old_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - low, 1 + high)
    return _Asked(-log_ratio, ratio != clipped, linear=clipped * advantages * logp)


def _clip_cov(old_logp, logp, advantages, mask, config, low, high) -> _Asked:
    """arXiv 2505.22617: of the tokens whose advantage and log-prob go together, some drawn at random take no part."""
    given = config.policy_loss
    share, least, most = (
        default if value is None else value
        for value, default in ((given.clip_cov_ratio, 0.0002), (given.clip_cov_lb, 1.0), (given.clip_cov_ub, 5.0))
    )
    with torch.no_grad():
        log_ratio = logp - old_logp
        together = (advantages - _masked_mean(advantages, mask)) * (logp - _masked_mean(logp, mask))
        free = (mask > 0) & ~_cut(log_ratio.exp(), advantages, low, high)
        found = (free & (together > least) & (together < most)).nonzero()
        kept = torch.ones_like(advantages)
        if len(found):
            drawn = torch.randperm(len(found))[: max(int(share * mask.sum().item()), 1)]
            at = found[drawn.to(found.device)]
            kept[at[:, 0], at[:, 1]] = 0
    return _Asked(-log_ratio, kept == 0, logp, old_logp, weight=kept)


METRICS = ("pg_clipfrac", "ppo_kl", "pg_clipfrac_lower")
# verl's name of a policy loss → (what it asks of ours, its metrics).
POLICY_LOSSES = {
    "vanilla": (_vanilla, METRICS),
    "gspo": (_gspo, METRICS),
    "cispo": (_cispo, METRICS),
    "clip_cov": (_clip_cov, METRICS[:2]),
}


def _policy_loss(original: Any, name: str) -> Any:
    ask, logged = POLICY_LOSSES[name]
    mode = inspect.signature(original).parameters["loss_agg_mode"].default

    def compute_policy_loss(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode=mode, config=None, rollout_is_weights=None
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
        asked = ask(old_log_prob, log_prob, advantages, response_mask, config, low, high)
        # A weight that is not negative commutes with the minimum, so it may scale the advantage.
        weights = [x for x in (rollout_is_weights, asked.weight) if x is not None]
        options = {"aggregation": how[0], "denominator": how[1], "mask": response_mask}
        if asked.logp is not None:
            scaled = math.prod(weights, start=advantages)
            loss = ppo_loss(asked.logp, asked.old_logp, scaled, clip=(low, high), **options).policy_loss
        else:
            # The entropy's place in the loss takes any number a token, with its gradient.
            still, linear = log_prob.detach(), math.prod(weights, start=asked.linear)
            loss = ppo_loss(
                still, still, torch.zeros_like(still), entropy=linear, entropy_coef=1.0, **options
            ).policy_loss
        lower = torch.zeros_like(asked.cut) if asked.lower is None else asked.lower
        found = {"pg_clipfrac": asked.cut, "ppo_kl": asked.kl, "pg_clipfrac_lower": lower}
        # verl's log: means over tokens, whatever the loss averages over.
        metrics = {f"actor/{key}": _masked_mean(found[key], response_mask).item() for key in logged}
        return loss, metrics

    return compute_policy_loss


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
    _swaps.function(functional.entropy_from_logits, _entropy_from_logits(functional.entropy_from_logits))
    chunked = functional.entropy_from_logits_with_chunking
    _swaps.function(chunked, _entropy_from_logits_with_chunking(chunked))
    advantage = _compute_gae_advantage_return(core.compute_gae_advantage_return)
    _swaps.function(core.compute_gae_advantage_return, advantage)
    _swaps.attribute(core.ADV_ESTIMATOR_REGISTRY, "gae", advantage)
    for name in POLICY_LOSSES:
        theirs = getattr(core, f"compute_policy_loss_{name}")
        ours = _policy_loss(theirs, name)
        _swaps.function(theirs, ours)
        _swaps.attribute(core.POLICY_LOSS_REGISTRY, name, ours)
    _swaps.function(core.compute_value_loss, _compute_value_loss(core.compute_value_loss))


def patch() -> None:
    """Let verl use our functions, in this process. Raises ImportError without verl."""
    once(_patch, _swaps)


def unpatch() -> None:
    """Put verl's own functions back."""
    _swaps.undo()
