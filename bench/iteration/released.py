"""The data path of the RTO authors' released code, re-created in eager PyTorch as the end-to-end baseline.

    padded [B, P + T] sequences (prompts on the left, responses on the right), 4 in a micro-batch
    transformers' `generate`, a micro-batch at a time, until its longest response ends
    log-probs: three models' logits of prompt and response in the model's dtype, log_softmax, gather
    rewards, values and GAE in that dtype, GAE by a Python loop over time; whitening over the rollout in fp32
    actor and critic: an update from micro-batches of 4, full logits again

Written from its description, not copied. The optimiser (DeepSpeed, AdamW) and the weights are ours: what differs
is the data path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor

from bench.kernels.peers import loop_gae
from rto_fast.config import RTOConfig
from rto_fast.contract import Request, Rollout
from rto_fast.models.heads import PolicyModel, ScalarModel

MICRO = 4


@dataclass(frozen=True)
class Padded:
    """A micro-batch; P prompt columns, T response columns."""

    sequences: Tensor
    """[B, P + T] int64."""
    attention_mask: Tensor
    """[B, P + T] int64, 1 inside."""
    action_mask: Tensor
    """[B, T] bool, the response tokens."""

    @staticmethod
    def make(prompts: Sequence[Tensor], responses: Sequence[Tensor], pad: int, device: torch.device) -> Padded:
        before, after = max(map(len, prompts)), max(map(len, responses))
        sequences = torch.full((len(prompts), before + after), pad)
        inside = torch.zeros_like(sequences)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            sequences[row, before - len(prompt) : before] = prompt
            sequences[row, before : before + len(response)] = response
            inside[row, before - len(prompt) : before + len(response)] = 1
        return Padded(sequences.to(device), inside.to(device), inside[:, before:].bool().to(device))


@dataclass(frozen=True)
class Experience:
    """What a micro-batch is trained on; all [B, T] in the model's dtype, advantages fp32 once whitened."""

    batch: Padded
    logp: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


class _Planned(LogitsProcessor):
    """Ends row i with its `ends[i]`-th token, and no sooner."""

    def __init__(self, ends: Tensor, prompt: int, stop: int) -> None:
        self.ends, self.prompt, self.stop = ends, prompt, stop

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        last = self.ends == input_ids.shape[1] - self.prompt + 1
        scores = scores.masked_fill(last[:, None], -torch.inf)
        scores[:, self.stop] = torch.where(last, 0.0, -torch.inf)
        return scores


@torch.no_grad()
def generate(lm: torch.nn.Module, requests: Sequence[Request], lengths: Sequence[int], stop: int, pad: int) -> int:
    """Samples each micro-batch with `lm.generate`; the number of response tokens."""
    device, total = next(lm.parameters()).device, 0
    for start in range(0, len(requests), MICRO):
        part, ends = requests[start : start + MICRO], torch.tensor(lengths[start : start + MICRO], device=device)
        none = [torch.zeros(0, dtype=torch.int64)] * len(part)
        batch = Padded.make([torch.tensor(q.prompt) for q in part], none, pad, device)
        width = batch.sequences.shape[1]
        out = lm.generate(
            input_ids=batch.sequences, attention_mask=batch.attention_mask, do_sample=True, top_k=0, top_p=1.0,
            temperature=1.0, max_new_tokens=int(ends.max()), eos_token_id=stop, pad_token_id=pad, use_cache=True,
            logits_processor=[_Planned(ends, width, stop)],
        )  # fmt: skip
        total += int(((out[:, width:] == stop).int().argmax(1) + 1).sum())
    return total


def micro_batches(rollout: Rollout, pad: int, device: torch.device) -> list[Padded]:
    prompts, responses = rollout.prompts(), rollout.responses()
    starts = range(0, len(rollout), MICRO)
    return [Padded.make(prompts[i : i + MICRO], responses[i : i + MICRO], pad, device) for i in starts]


def _logits(model: PolicyModel, batch: Padded) -> Tensor:
    """[B, T, V] logits before each response token, a view of those of the whole [B, P + T, V]."""
    hidden = _backbone(model.lm.base_model, batch)
    logits = F.linear(hidden, model.lm.get_output_embeddings().weight)
    return logits[:, -batch.action_mask.shape[1] - 1 : -1]


def _values(model: ScalarModel, batch: Padded) -> Tensor:
    """[B, P + T] in the model's dtype."""
    hidden = _backbone(model.classifier.base_model, batch)
    return (F.linear(hidden, model.classifier.score.weight.to(hidden.dtype)).squeeze(-1) - model.mean) / model.std


def _backbone(backbone: torch.nn.Module, batch: Padded) -> Tensor:
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    out = backbone(batch.sequences, attention_mask=batch.attention_mask, position_ids=positions, use_cache=False)
    return out.last_hidden_state


def _gather(logits: Tensor, batch: Padded) -> Tensor:
    actions = batch.sequences[:, -batch.action_mask.shape[1] :]
    return torch.log_softmax(logits, -1).gather(-1, actions[..., None]).squeeze(-1)


@contextmanager
def padded_forwards(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside, policies and scalar models take a Padded and answer with logits and values, by plain attention."""
    inner = [m.inner for m in models]
    before = [m.config._attn_implementation for m in inner]
    for m in inner:
        m.set_attn_implementation("sdpa")
    try:
        with mock.patch.object(PolicyModel, "forward", _logits), mock.patch.object(ScalarModel, "forward", _values):
            yield
    finally:
        for m, attention in zip(inner, before, strict=True):
            m.set_attn_implementation(attention)


@torch.no_grad()
def experience(batch: Padded, policy, critic, reference, dpo, reward_model, config: RTOConfig) -> Experience:
    """Scores, token rewards and GAE of one micro-batch; the models as `padded_forwards` has them."""
    mask, width = batch.action_mask, batch.action_mask.shape[1]
    logp, ref_logp, dpo_logp = (_gather(model(batch), batch) for model in (policy, reference, dpo))
    values = critic(batch)[:, -width - 1 : -1]
    last = mask.shape[1] - 1 - mask.long().fliplr().argmax(1, keepdim=True)
    end = last + batch.sequences.shape[1] - width
    score = reward_model(batch).gather(1, end).clamp(-config.score_clip, config.score_clip)
    reward = (config.beta1 * (dpo_logp - ref_logp)).clamp(-config.dpo_clip, config.dpo_clip)
    reward = (reward - config.beta2 * (logp - ref_logp)) * mask
    reward = reward.scatter_add(1, last, config.beta3 * score.to(reward.dtype))
    values = values.to(reward.dtype) * mask
    advantages, returns = loop_gae(reward, values, mask, config.gamma, config.lam)
    return Experience(batch, logp, values, reward, advantages, returns)


def whiten(parts: Sequence[Experience]) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of the advantages over the whole rollout, fp32."""
    inside = torch.cat([p.advantages[p.batch.action_mask].float() for p in parts])
    return inside.mean(), (inside - inside.mean()).square().mean().clamp(min=1e-8).rsqrt()


def _sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    return ((x * mask).sum(-1) / mask.sum(-1)).sum()


def policy_loss(
    policy, part: Experience, whitening: tuple[Tensor, Tensor], responses: int, config: RTOConfig
) -> Tensor:
    """This micro-batch's share of a train batch of `responses`."""
    logp = _gather(policy(part.batch), part.batch)
    advantages = (part.advantages - whitening[0]) * whitening[1]
    ratio = (logp - part.logp).exp()
    bounded = ratio.clamp(1 - config.clip, 1 + config.clip)
    return _sequence_mean(-torch.min(ratio * advantages, bounded * advantages), part.batch.action_mask) / responses


def value_loss(critic, part: Experience, responses: int, config: RTOConfig) -> Tensor:
    mask = part.batch.action_mask
    values = critic(part.batch)[:, -mask.shape[1] - 1 : -1]
    bounded = part.values + (values - part.values).clamp(-config.value_clip, config.value_clip)
    loss = 0.5 * torch.max((values - part.returns) ** 2, (bounded - part.returns) ** 2)
    return _sequence_mean(loss, mask) / responses
