"""OpenRLHF (0.11): log-probs from logits, GAE, and the PPO policy and value losses on our kernels.

from rto_kernels.integrations import openrlhf
openrlhf.patch()
# then start OpenRLHF's trainer in this process; in Ray workers, call it first thing in each
"""

import importlib
import math
from typing import Any

import torch

from ..gae import gae
from ..logits_logprob import logprobs_from_logits
from ..ppo_loss import ppo_loss
from ._swap import Swaps, bounded_logp, once, supported

FALLS_THROUGH = (
    "PPO, REINFORCE++, GRPO, RLOO trainers: a policy loss that corrects for the sampler or has a sequence's ratio, "
    "where no action mask is given (their experience always has one)",
    "SFT, DPO and reward-model trainers: their losses, which are none of PPO's; the log-probs under them are ours",
    "any trainer: fp64 tensors, nested tensors, DTensors; inputs that are not [batch, tokens]",
)

LOG_RATIO_LIMIT = 20.0

_swaps = Swaps("openrlhf")


def _log_probs_from_logits(original: Any) -> Any:
    def log_probs_from_logits(logits, labels, temperature=1.0):
        if not supported(logits) or labels.shape != logits.shape[:-1]:
            return original(logits, labels, temperature)
        return logprobs_from_logits(logits, labels, temperature=temperature)

    return log_probs_from_logits


def _get_advantages_and_returns(original: Any) -> Any:
    @torch.no_grad()
    def get_advantages_and_returns(self, values, rewards, action_mask, gamma, lambd):
        if not supported(values, rewards) or rewards.ndim != 2:
            return original(self, values, rewards, action_mask, gamma, lambd)
        out = gae(rewards, values, gamma=gamma, lam=lambd, mask=action_mask, gaps="zero")
        return out.advantages, out.returns

    return get_advantages_and_returns


def _aggregation(token_level_loss, dp_size, batch_num_tokens, global_batch_size) -> dict[str, Any]:
    count = batch_num_tokens if token_level_loss else global_batch_size
    return {
        "aggregation": "token" if token_level_loss else "sequence",
        "denominator": None if count is None else count / dp_size,
    }


def _masked_mean(x, mask):
    return x.float().mean() if mask is None else (x * mask).sum() / mask.sum()


def _sampler_correction(loss: Any, old_logp, rollout_logp, mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight of each token ≥ 0, share of units that were cut or dropped, log's KL), by OpenRLHF's is_correction_*.

    TIS clips π_old/π_rollout of a token, ICEPOP and the sequence-wise masks drop what lies outside the bounds; bounds
    are for the ratio, for the binary KL or for the total variation of the sampled token.
    """
    low, high = loss.is_correction_threshold
    by_sequence = loss.is_correction_level == "seq"
    log_ratio = old_logp - rollout_logp
    if loss.is_correction_gating == "ratio":
        found = log_ratio
    else:
        p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout_logp, old_logp))
        kl = loss.is_correction_gating == "binary_kl"
        found = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log() if kl else (p - q).abs()
    if by_sequence:
        found = ((found * mask).sum(-1) / mask.sum(-1))[:, None]
    if loss.is_correction_gating == "ratio":
        found = found.exp()
    cut = ~((found >= low) & (found <= high))
    weight = found.clamp(low, high) if loss.is_correction_mode == "clip" else torch.where(cut, 0.0, log_ratio.exp())
    share = cut.float().mean() if by_sequence else _masked_mean(cut.float(), mask)
    return weight, share, _masked_mean(-log_ratio, mask)


def _sequence_ratio(log_ratio: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """GSPO's log ratio (arXiv 2507.18071): a sequence's mean, at each of its tokens."""
    mean = (log_ratio.where(mask != 0, 0.0)).sum(-1) / mask.sum(-1).clamp(min=1)
    return mean[:, None].expand_as(log_ratio)


def _policy_loss_forward(original: Any) -> Any:
    def forward(
        self,
        log_probs,
        old_log_probs,
        advantages,
        action_mask=None,
        rollout_log_probs=None,
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
    ):
        gspo, corrected = self.policy_loss_type == "gspo", self.is_correction_level != "off"
        needed = (log_probs, old_log_probs, advantages, rollout_log_probs if corrected else None)
        known = gspo or self.policy_loss_type == "ppo"
        if corrected or gspo:
            known = known and action_mask is not None and (not corrected or rollout_log_probs is not None)
        if not known or log_probs.ndim != 2 or not supported(*needed):
            return original(
                self, log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, dp_size,
                batch_num_tokens, global_batch_size,
            )  # fmt: skip
        dual = None if self.dual_clip is None else math.log(self.dual_clip)
        advantages = advantages.expand_as(log_probs)
        logp, old_logp, limit, weighted = log_probs, old_log_probs, LOG_RATIO_LIMIT, advantages
        sampler_kl = cut_share = None
        if gspo:
            logp = _sequence_ratio(log_probs - (rollout_log_probs if corrected else old_log_probs), action_mask)
            old_logp, limit = torch.zeros_like(logp), math.inf
        elif corrected:
            with torch.no_grad():
                weight, cut_share, sampler_kl = _sampler_correction(self, old_log_probs, rollout_log_probs, action_mask)
                # A weight that is not negative commutes with the minimum, so it may scale the advantage.
                weighted = advantages * weight
        loss = ppo_loss(
            bounded_logp(logp, old_logp, advantages, limit, dual),
            old_logp,
            weighted,
            clip=(self.clip_eps_low, self.clip_eps_high),
            mask=action_mask,
            **_aggregation(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size),
        ).policy_loss
        with torch.no_grad():  # OpenRLHF's log: means over tokens, whatever the loss averages over
            ratio = (logp - old_logp).exp()
            cut = ((advantages > 0) & (ratio > 1 + self.clip_eps_high)) | (
                (advantages < 0) & (ratio < 1 - self.clip_eps_low)
            )
            clip_ratio = _masked_mean(cut.float(), action_mask)
            kl = _masked_mean(old_log_probs - log_probs, action_mask)
        return loss, clip_ratio, kl, sampler_kl, cut_share

    return forward


def _value_loss_forward(original: Any) -> Any:
    def forward(
        self,
        values,
        old_values,
        returns,
        action_mask=None,
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
    ):
        if values.ndim != 2 or not supported(values, old_values, returns):
            return original(
                self, values, old_values, returns, action_mask, dp_size, batch_num_tokens, global_batch_size
            )
        still = values.detach()  # a policy that has not moved: only the value half is asked for
        return ppo_loss(
            still,
            still,
            still,
            values,
            old_values,
            returns,
            value_clip=self.clip_eps,
            mask=action_mask,
            **_aggregation(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size),
        ).value_loss

    return forward


def _patch() -> None:
    loss = importlib.import_module("openrlhf.models.loss")
    utils = importlib.import_module("openrlhf.models.utils")
    _swaps.function(utils.log_probs_from_logits, _log_probs_from_logits(utils.log_probs_from_logits))
    _swaps.attribute(loss.PolicyLoss, "forward", _policy_loss_forward(loss.PolicyLoss.forward))
    _swaps.attribute(loss.ValueLoss, "forward", _value_loss_forward(loss.ValueLoss.forward))
    try:
        maker = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
    except ImportError:
        return  # it needs vLLM and Ray: a process without them makes no experience
    ours = _get_advantages_and_returns(maker.get_advantages_and_returns)
    _swaps.attribute(maker, "get_advantages_and_returns", ours)


def patch() -> None:
    """Let OpenRLHF use our functions, in this process. Raises ImportError without OpenRLHF."""
    once(_patch, _swaps)


def unpatch() -> None:
    """Put OpenRLHF's own functions back."""
    _swaps.undo()
