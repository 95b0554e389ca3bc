"""Sources of token rewards: one unscaled number for each response token.

beta1 and the source's weight scale it, `dpo_clip` bounds it and `credit` pays it, as they do the DPO models' log-ratio.
A source passes NaN and infinity on: the trainer counts them and skips the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rto_kernels import token_logprobs
from torch import Tensor

from rto_fast.backend.frozen import FrozenModel
from rto_fast.contract import ResponseTexts, Rollout
from rto_fast.models.packing import PackedBatch, Placement
from rto_fast.scoring.reward_source import Model


class TokenSource(Protocol):
    """Gives every response token a number."""

    def score(self, rollout: Rollout, texts: ResponseTexts, reference: Tensor) -> Tensor:
        """[R] fp32. reference: [R] fp32 on the CPU, the KL reference's log-probs at temperature 1 (nats).

        Raises RewardError where there is no number.
        """
        ...


class Mixture:
    """Several DPO models as one, whose log-prob is the base's plus the weighted sum of their log-ratios.

        log pi = log pi_base + sum_i w_i d_i - k std_i(d_i),    d_i = log(pi_i / pi_base)

    std: over the models, with divisor n (RTO's pessimism, arXiv 2404.18922, takes a lower bound of the learnt reward).
    """

    def __init__(self, models: list[Model], weights: tuple[float, ...], pessimism: float) -> None:
        self.models, self.weights, self.pessimism = models, weights, pessimism

    def mix(self, base: Tensor, logps: Sequence[Tensor]) -> Tensor:
        """[R] fp32; base: [R] log pi_base; logps: [R] of each model."""
        ratios = torch.stack([logp - base for logp in logps])
        weights = torch.tensor(self.weights, dtype=ratios.dtype, device=ratios.device)
        mixed = (weights[:, None] * ratios).sum(dim=0)
        if self.pessimism:
            mixed = mixed - self.pessimism * ratios.std(dim=0, correction=0)
        return base + mixed


@dataclass(frozen=True)
class LogRatio:
    """log(pi / pi_base) of two language models."""

    model: Model
    base: Model | None
    """None: the KL reference."""
    placement: Placement

    @torch.no_grad()
    def score(self, rollout: Rollout, texts: ResponseTexts, reference: Tensor) -> Tensor:
        base = reference if self.base is None else self._logps(self.base, rollout)
        return self._logps(self.model, rollout) - base

    def _logps(self, model: Model, rollout: Rollout) -> Tensor:
        return over_rollout(self.placement, rollout, model, model)


@dataclass(frozen=True)
class Endogenous:
    """The reward that a language model's own logits z imply (arXiv 2506.23235), with a = a_t, s = s_t, s' = s_(t+1):

        r_t = z(s, a) - V(s') = alpha log pi(a|s) + V(s) - V(s'),    V(s) = alpha logsumexp(z(s, .) / alpha)

    Nothing follows an end of turn, so V is 0 there; behind a truncated response it is that of its last state.
    """

    model: Model
    alpha: float
    placement: Placement

    @torch.no_grad()
    def score(self, rollout: Rollout, texts: ResponseTexts, reference: Tensor) -> Tensor:
        ends = rollout.truncated
        sequences, prompts = rollout.sequences(), rollout.prompt_lens.tolist()
        out: list[Tensor] = [torch.zeros(0)] * len(sequences)
        # A token more at the end, whichever: its state is the one behind the response.
        longer = [torch.cat([s, s[-1:]]) for s in sequences]
        with at_work(self.model):
            for index, batch in self.placement.micro(longer, prompts):
                chosen, value = self.model(batch, self._read)
                lens = batch.cu_responses.diff().tolist()
                for i, z, v in zip(index, chosen.cpu().split(lens), value.cpu().split(lens), strict=False):
                    after = v[1:].clone()
                    if after.numel() and not ends[i]:
                        after[-1] = 0.0
                    out[i] = z[:-1] - after
        return torch.cat(out) if out else torch.zeros(0)

    def _read(self, hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None, softcap: Any) -> Any:
        """(logits of the targets [R], V of the states [R]), fp32: the kernel's log-prob is z / alpha - logsumexp."""
        logit = (hidden.float() * weight[targets].float()).sum(dim=-1)
        logit = logit if bias is None else logit + bias[targets].float()
        logit = softcap * torch.tanh(logit / softcap) if softcap else logit
        logp: Any = token_logprobs(hidden, weight, targets, bias=bias, softcap=softcap, temperature=self.alpha)
        return logit, logit - self.alpha * logp


@dataclass(frozen=True)
class Scalar:
    """The number of a model with a one-output head, read at each response token."""

    model: Model
    differences: bool
    """The change from the token before, the prompt's last for the first: potential-based, so that the sum over a
    response is the model's number at its end less that at its start."""
    placement: Placement

    @torch.no_grad()
    def score(self, rollout: Rollout, texts: ResponseTexts, reference: Tensor) -> Tensor:
        def read(batch: PackedBatch) -> Tensor:
            at = batch.state_positions + 1
            if not self.differences:
                return self.model(batch, at)
            before, after = self.model(batch, torch.cat([batch.state_positions, at])).split(at.numel())
            return after - before

        return over_rollout(self.placement, rollout, self.model, read)


def over_rollout(placement: Placement, rollout: Rollout, model: Model, read: Callable[[PackedBatch], Tensor]) -> Tensor:
    """[R] fp32 on the CPU: what `read` finds by the model at each batch's response tokens, in the rollout's order."""
    out = [torch.zeros(0)] * len(rollout)
    with at_work(model):
        for index, batch in placement.micro(rollout.sequences(), rollout.prompt_lens.tolist()):
            found = read(batch).float().cpu()
            for i, one in zip(index, found.split(batch.cu_responses.diff().tolist()), strict=False):
                out[i] = one.clone()
    return torch.cat(out) if out else torch.zeros(0)


@contextmanager
def at_work(model: Model) -> Iterator[None]:
    """Inside, a model that parks is on the device."""
    parked = [model] if isinstance(model, FrozenModel) else []
    for one in parked:
        one.fetch()
    try:
        yield
    finally:
        for one in parked:
            one.park()
