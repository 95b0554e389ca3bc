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
    "PolicyLoss of a GSPO run: policy_loss_type 'gspo', whose ratios are a sequence's",
    "PolicyLoss of any run with an is_correction_level other than 'off' (TIS, ICEPOP, ...)",
    "any: fp64 tensors, nested tensors, DTensors; inputs that are not [batch, tokens]",
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
        plain = self.policy_loss_type == "ppo" and self.is_correction_level == "off"
        if not plain or log_probs.ndim != 2 or not supported(log_probs, old_log_probs, advantages):
            return original(
                self, log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, dp_size,
                batch_num_tokens, global_batch_size,
            )  # fmt: skip
        dual = None if self.dual_clip is None else math.log(self.dual_clip)
        advantages = advantages.expand_as(log_probs)
        loss = ppo_loss(
            bounded_logp(log_probs, old_log_probs, advantages, LOG_RATIO_LIMIT, dual),
            old_log_probs,
            advantages,
            clip=(self.clip_eps_low, self.clip_eps_high),
            mask=action_mask,
            **_aggregation(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size),
        ).policy_loss
        with torch.no_grad():  # OpenRLHF's log: means over tokens, whatever the loss averages over
            log_ratio = log_probs - old_log_probs
            above = (advantages > 0) & (log_ratio.exp() > 1 + self.clip_eps_high)
            below = (advantages < 0) & (log_ratio.exp() < 1 - self.clip_eps_low)
            clip_ratio = _masked_mean((above | below).float(), action_mask)
            kl = _masked_mean(-log_ratio, action_mask)
        return loss, clip_ratio, kl, None, None

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
