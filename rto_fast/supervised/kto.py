"""KTO: single answers, desirable or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rto_fast import distributed
from rto_fast.algo import preference
from rto_fast.config import DPOConfig
from rto_fast.data.load import PreferenceData
from rto_fast.errors import require
from rto_fast.models.packing import Placement
from rto_fast.supervised.loop import held_out_batches
from rto_fast.supervised.stage import Row, RowBatch, Stage, Sums


@dataclass(frozen=True)
class Answers:
    """Single answers for KTO, each with another example's completion under its prompt; lists of E."""

    rows: list[Row]
    mismatched: list[Row]
    desirable: Tensor
    """[E] bool."""

    @staticmethod
    def of(data: PreferenceData, max_length: int, spare: Sequence[Row] = ()) -> Answers:
        """A pair becomes two answers, a labelled row one (its other response is empty).

        The mismatched completion is that of the next answer (cyclic, then `spare`) to another prompt, cut to
        max_length tokens. Raises ConfigError where all prompts are one.
        """
        rows, desirable = [], []
        for prompt, chosen, rejected in zip(data.prompt_ids, data.chosen_ids, data.rejected_ids, strict=True):
            for response, good in ((list(chosen), True), (list(rejected), False)):
                if response:
                    rows.append(Row(list(prompt), (response,)))
                    desirable.append(good)
        mismatched = []
        for i, row in enumerate(rows):
            others = itertools.chain((rows[(i + j) % len(rows)] for j in range(1, len(rows))), spare)
            other = next((o for o in others if o.prompt != row.prompt), None)
            require(other is not None, "objective: KTO needs at least two different prompts in the data")
            mismatched.append(Row(row.prompt, (other.responses[0][: max_length - len(row.prompt)],)))
        return Answers(rows, mismatched, torch.tensor(desirable, dtype=torch.bool))


class KTO(Stage):
    """Single answers, desirable or not, against the batch's mean log-ratio of mismatched completions."""

    name = "KTO"

    def __init__(
        self, model: nn.Module, answers: tuple[Answers, Answers], reference: tuple[Tensor, Tensor],
        mismatched_reference: tuple[Tensor, Tensor], config: DPOConfig,
    ) -> None:  # fmt: skip
        """answers: of training and of evaluation; the references' summed log-probs of their rows, [E, 1] fp32 each."""
        self.model, self.answers, self.config = model, answers, config
        self.train, self.held_out = answers[0].rows, answers[1].rows
        self.reference, self.mismatched_reference = reference, mismatched_reference
        self.desirable = tuple(a.desirable for a in answers)
        self.kl = torch.zeros(())

    @torch.no_grad()
    def begin(self, model: Callable[..., Any], index: Sequence[int], held_out: bool, placement: Placement) -> None:
        """The baseline over the whole batch, all ranks: it knows nothing of micro-batches."""
        rows = [self.answers[held_out].mismatched[i] for i in index]
        table, total = self.mismatched_reference[held_out], torch.zeros((), dtype=torch.float64)
        for batch in held_out_batches(rows, placement):
            logp = model(batch.packed)
            if batch.index:
                ratio = batch.sequence_sums(logp)[:, 0].double().cpu() - table[[index[i] for i in batch.index], 0]
                total += ratio.sum()
        self.kl = preference.kto_baseline(distributed.sum_over_ranks(total), len(rows)).float().to(placement.device)

    def loss(self, model: Callable[..., Any], batch: RowBatch) -> tuple[Tensor, Sums]:
        config = self.config
        logp = batch.sequence_sums(model(batch.packed))
        ratio = (logp - batch.looked_up(self.reference).to(logp.device))[:, 0]
        desirable = batch.looked_up(self.desirable).to(ratio.device)
        loss = preference.kto_loss(
            ratio, desirable, self.kl, beta=config.beta, desirable_weight=config.kto_desirable_weight,
            undesirable_weight=config.kto_undesirable_weight,
        )  # fmt: skip
        reward = torch.where(desirable, ratio, -ratio) * config.beta
        baseline = torch.where(desirable, self.kl, -self.kl) * config.beta
        metrics = {
            "accuracy": (reward > baseline).float().sum(),
            "signed_reward": reward.sum(),
            "kl_baseline": self.kl * len(batch.rows),
        }
        return loss.sum(), metrics
