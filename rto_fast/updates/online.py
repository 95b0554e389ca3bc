"""Train the DPO model on the rollouts that it rewards: PRIME and online RTO.

With d(y) = sum_t log(pi_dpo / pi_ref)(y_t) of a response, PRIME (arXiv 2502.01456) fits sigmoid(beta * d) to the
outcome of each response; online RTO takes the DPO loss on each prompt's best response against its worst.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from rto_fast.algo.losses import OnlineStats
from rto_fast.algo.preference import dpo_loss, outcome_loss
from rto_fast.contract import Rollout, Scores
from rto_fast.models.packing import PackedBatch
from rto_fast.updates.ppo import Share, TrainBatch, Trained, UpdateStats


class OnlineBatch(TrainBatch, ABC):
    """The rows of one optimiser step of the numerator: responses, or pairs of them.

    Losses are divided by the batch's rows, so neither the number of ranks nor the size of a micro-batch changes them.
    """

    def __init__(self, run: Trained, rollout: Rollout, scores: Scores, index: Sequence[int]) -> None:
        """index: the responses of the train batch, those to one prompt side by side."""
        self.run, self.rollout, self.scores = run, rollout, scores
        self.rows = self.rows_of(index)
        self.index = [i for row in self.rows for i in row]
        self.micro = self.shared_out(self.rows) if self.rows else []

    @abstractmethod
    def rows_of(self, index: Sequence[int]) -> list[list[int]]:
        """The responses of each row; those that can teach nothing are left out."""

    @abstractmethod
    def row_losses(self, ratios: Tensor, sequences: list[int]) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of each row of a micro-batch; ratios: [B] fp32, d of the responses at `sequences`."""

    def update(self, step: int) -> UpdateStats[Any] | None:
        """One optimiser step, or None where no row is left: the same on every rank."""
        engine = self.run.online
        assert engine is not None, "a run whose token reward stays as it is has no update of it"
        if not self.rows:
            return None

        def loss(batch: PackedBatch, share: Share) -> tuple[Tensor, OnlineStats]:
            change = engine(batch) - self.scores.dpo_ref_logp[share.tokens]
            ratios = torch.segment_reduce(change, "sum", lengths=batch.cu_responses.diff())
            each, right = self.row_losses(ratios, share.sequences)
            stats = OnlineStats(right.sum() / len(self.rows), ratios.detach().abs().max())
            return each.sum() / len(self.rows), stats

        return self._update(engine, loss, step, OnlineStats)


class OutcomeBatch(OnlineBatch):
    """PRIME: every response with its outcome; empty ones are left out."""

    def rows_of(self, index: Sequence[int]) -> list[list[int]]:
        return [[i] for i in index if self.rollout.response_lens[i] > 0]

    def row_losses(self, ratios: Tensor, sequences: list[int]) -> tuple[Tensor, Tensor]:
        score = self.scores.score[sequences]
        outcome = (score > 0.5).float() if self.run.config.outcome == "binary" else torch.sigmoid(score)
        loss = outcome_loss(ratios, outcome, beta=self.run.config.online_beta)
        return loss, (1 + ratios.detach().sign() * (outcome - 0.5).sign()) / 2


class BestWorstBatch(OnlineBatch):
    """Online RTO: each prompt's best response and its worst by score; a prompt whose scores are all equal has none."""

    def rows_of(self, index: Sequence[int]) -> list[list[int]]:
        score, draw = self.scores.score.tolist(), self.rollout.sample_index.tolist()
        groups = [list(group) for _, group in groupby(index, key=lambda i: draw[i])]
        pairs = [[max(g, key=lambda i: score[i]), min(g, key=lambda i: score[i])] for g in groups]
        lens = self.rollout.response_lens
        return [pair for pair in pairs if score[pair[0]] > score[pair[1]] and lens[pair].any()]

    def row_losses(self, ratios: Tensor, sequences: list[int]) -> tuple[Tensor, Tensor]:
        best, worst = ratios.view(-1, 2).unbind(1)
        none = torch.zeros_like(best)  # the reference is in the ratios already
        loss = dpo_loss(best, worst, none, none, beta=self.run.config.online_beta)
        return loss, (1 + (best - worst).detach().sign()) / 2
