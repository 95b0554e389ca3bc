"""Objectives on pairs: which sequences a row has, and which loss they get."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rto_fast.algo import preference
from rto_fast.backend.frozen import FrozenModel
from rto_fast.config import DPOConfig
from rto_fast.data.load import PreferenceData
from rto_fast.models.heads import logp_and_kl
from rto_fast.supervised.stage import Row, RowBatch, Rows, Stage, Sums


@dataclass(frozen=True)
class Pairs:
    """A micro-batch of pairs, [P, 2] each: chosen, rejected."""

    logp: Tensor
    """Summed log-probs, nats."""
    ref_logp: Tensor
    """The reference's."""
    lens: Tensor
    """Response tokens, fp32."""

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """Log-ratios of chosen and of rejected, [P] each."""
        chosen, rejected = (self.logp - self.ref_logp).unbind(1)
        return chosen, rejected


PairLoss = Callable[[Pairs, DPOConfig], Tensor]
"""Losses of pairs, [P], from log-probs of policy and reference."""
KLLoss = Callable[[Sequence[Tensor], Sequence[Tensor], DPOConfig], Tensor]
"""Losses of pairs, [P], from log-ratios and sequential KLs of (chosen, rejected)."""

TokenWeights = Callable[[Tensor, Tensor, DPOConfig], Tensor]
"""Weights of tokens, [R], from the guide's log-ratios and from 1 on tokens of chosen, -1 on rejected's."""


class PairStage(Stage, ABC):
    """Pairs of responses with a loss and two implicit rewards each."""

    def __init__(self, model: nn.Module, train: Sequence[Row], held_out: Sequence[Row], config: DPOConfig) -> None:
        self.name = config.objective.upper().replace("_", "-")
        self.model, self.train, self.held_out, self.config = model, train, held_out, config

    @abstractmethod
    def judge(self, model: Callable[..., Any], batch: RowBatch) -> tuple[Tensor, Tensor, Tensor]:
        """[P] each: the pairs' losses, and the implicit rewards of chosen and rejected."""

    def loss(self, model: Callable[..., Any], batch: RowBatch) -> tuple[Tensor, Sums]:
        loss, chosen, rejected = self.judge(model, batch)
        metrics = {
            "accuracy": (chosen > rejected).float().sum(),
            "margin": (chosen - rejected).sum(),
            "reward_chosen": chosen.sum(),
            "reward_rejected": rejected.sum(),
        }
        return loss.sum(), metrics


class Referenced(PairStage):
    """Losses of log-ratios, against reference log-probs that were computed once, before training."""

    def __init__(
        self, model: nn.Module, train: Sequence[Row], held_out: Sequence[Row], config: DPOConfig,
        pair_loss: PairLoss, reference: tuple[Tensor, Tensor],
    ) -> None:  # fmt: skip
        """reference: summed log-probs of the training and the held-out rows, [rows, 2] fp32 each."""
        super().__init__(model, train, held_out, config)
        self.pair_loss, self.reference = pair_loss, reference

    def judge(self, model: Callable[..., Any], batch: RowBatch) -> tuple[Tensor, Tensor, Tensor]:
        logp = batch.sequence_sums(model(batch.packed))
        pairs = Pairs(logp, batch.looked_up(self.reference).to(logp.device), batch.lengths)
        chosen, rejected = pairs.ratios
        return self.pair_loss(pairs, self.config), self.config.beta * chosen, self.config.beta * rejected


class SimPO(PairStage):
    """Mean log-probs of a token, no reference."""

    def judge(self, model: Callable[..., Any], batch: RowBatch) -> tuple[Tensor, Tensor, Tensor]:
        logp, lens, config = batch.sequence_sums(model(batch.packed)), batch.lengths, self.config
        loss = preference.simpo_loss(*logp.unbind(1), *lens.unbind(1), beta=config.simpo_beta, gamma=config.simpo_gamma)
        chosen, rejected = (config.simpo_beta * logp / lens).unbind(1)
        return loss, chosen, rejected


class MPO(PairStage):
    """Chosen against rejected by summed log-probs; both answers stand for the reference's own. Rewards are beta * logp.

    Pairs that were sampled from the reference are what its data would be.
    """

    def judge(self, model: Callable[..., Any], batch: RowBatch) -> tuple[Tensor, Tensor, Tensor]:
        logp, config = batch.sequence_sums(model(batch.packed)), self.config
        kept = logp.sum(1) / batch.lengths.sum(1)
        loss = preference.mpo_loss(logp[:, 0], logp[:, 1], kept, beta=config.beta, keep=config.mpo_keep)
        chosen, rejected = (config.beta * logp).unbind(1)
        return loss, chosen, rejected


class MPPO(PairStage):
    """One chosen response against any number of rejected ones; no reference. Rewards are mean log-probs of a token."""

    def judge(self, model: Callable[..., Any], batch: RowBatch) -> tuple[Tensor, Tensor, Tensor]:
        sums = torch.segment_reduce(model(batch.packed), "sum", lengths=batch.packed.cu_responses.diff())
        mean = (sums / batch.packed.cu_responses.diff())[batch.place]
        negatives = torch.tensor([len(row.responses) - 1 for row in batch.rows], device=mean.device)
        first = torch.cat([negatives.new_zeros(1), (negatives + 1).cumsum(0)[:-1]])
        is_chosen = torch.zeros(mean.numel(), dtype=torch.bool, device=mean.device)
        is_chosen[first] = True
        chosen, rejected = mean[is_chosen], mean[~is_chosen]
        loss = preference.mppo_loss(chosen, rejected, negatives)
        return loss, chosen, torch.segment_reduce(rejected, "mean", lengths=negatives)


class TDPO(PairStage):
    """TDPO1 and TDPO2: the whole next-token distributions of reference and policy are compared at each token.

    The reference stays in memory, whole on every rank, since distributions are too large to keep.
    """

    def __init__(
        self, model: nn.Module, train: Sequence[Row], held_out: Sequence[Row], config: DPOConfig,
        kl_loss: KLLoss, reference: FrozenModel,
    ) -> None:  # fmt: skip
        """reference: a PolicyModel, not partitioned."""
        super().__init__(model, train, held_out, config)
        self.kl_loss, self.reference = kl_loss, reference

    def judge(self, model: Callable[..., Any], batch: RowBatch) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            ref_hidden, ref_head, ref_logp = self.reference.module.states(batch.packed)
        logp, kl = model(batch.packed, logp_and_kl(ref_hidden, ref_head))
        ratios = batch.sequence_sums(logp - ref_logp).unbind(1)
        kls, config = batch.sequence_sums(kl).unbind(1), self.config
        return self.kl_loss(ratios, kls, config), config.beta * ratios[0], config.beta * ratios[1]


class TokenWeighted(PairStage):
    """TGDPO and TIS-DPO: a guide's log-ratio weighs each token. Rewards are DPO's.

    Reference and guides stay in memory, whole on every rank.
    """

    def __init__(
        self, model: nn.Module, train: Sequence[Row], held_out: Sequence[Row], config: DPOConfig,
        weights: TokenWeights, reference: FrozenModel, guide: FrozenModel, guide_base: FrozenModel,
    ) -> None:  # fmt: skip
        """guide_base: may be `reference`, which is then read once."""
        super().__init__(model, train, held_out, config)
        self.weights, self.reference, self.guide, self.guide_base = weights, reference, guide, guide_base

    def judge(self, model: Callable[..., Any], batch: RowBatch) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            ref_logp = self.reference(batch.packed)
            base_logp = ref_logp if self.guide_base is self.reference else self.guide_base(batch.packed)
            weights = self.weights(self.guide(batch.packed) - base_logp, batch.signs, self.config)
        token_ratio = model(batch.packed) - ref_logp
        weighted, plain = (batch.sequence_sums(r).unbind(1) for r in (weights * token_ratio, token_ratio))
        config = self.config
        loss = preference.token_weighted_loss(*weighted, beta=config.beta)
        return loss, config.beta * plain[0], config.beta * plain[1]


def pair_rows(data: PreferenceData) -> Rows:
    """Rows of chosen and rejected."""
    return Rows(data.prompt_ids, data.chosen_ids, data.rejected_ids)


def grouped_rows(data: PreferenceData) -> list[Row]:
    """Rows of one chosen and N rejected: the pairs that share prompt and chosen, in the order they first come."""
    groups: dict[tuple, list[list[int]]] = {}
    for prompt, chosen, rejected in zip(data.prompt_ids, data.chosen_ids, data.rejected_ids, strict=True):
        groups.setdefault((tuple(prompt), tuple(chosen)), []).append(list(rejected))
    return [Row(list(prompt), (list(chosen), *rejected)) for (prompt, chosen), rejected in groups.items()]
