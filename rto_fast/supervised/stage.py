"""The contract of a supervised stage, and its rows packed for the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rto_fast.models.packing import PackedBatch, Placement

Sums = dict[str, Tensor]
"""Metric name -> sum over rows (fp32 scalar)."""


@dataclass(frozen=True)
class Row:
    """One row as the model reads it: each of its responses behind the prompt."""

    prompt: list[int]
    responses: tuple[list[int], ...]

    @property
    def tokens(self) -> int:
        return sum(len(self.prompt) + len(r) for r in self.responses)


class Rows(Sequence[Row]):
    """Rows that are made when they are asked for; the tokens stay in the data's arrays.

    As lists of Python's numbers they would take about nine times the memory, on every rank.
    """

    def __init__(self, prompts: Sequence[list[int]], *responses: Sequence[list[int]]) -> None:
        """prompts: of each row; responses: the first one of each row, then the second one of each, and so on."""
        self.prompts, self.responses = prompts, responses

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index):
        """An int gives a Row, a slice other Rows."""
        parts = self.prompts[index], *(response[index] for response in self.responses)
        return Rows(*parts) if isinstance(index, slice) else Row(parts[0], parts[1:])


class Stage(Protocol):
    """What a supervised stage trains and how; the methods with a body are what most stages want."""

    name: str
    model: nn.Module
    train: Sequence[Row]
    held_out: Sequence[Row]

    def begin(self, model: Callable[..., Any], index: Sequence[int], held_out: bool, placement: Placement) -> None:
        """Before a train batch or an evaluation, on all ranks: whatever the loss needs of all its rows together.

        index: their positions in `train`, or in `held_out`.
        """
        return None

    def loss(self, model: Callable[..., Any], batch: RowBatch) -> tuple[Tensor, Sums]:
        """Sum of the loss over the batch's rows or tokens, and sums of metrics over its rows."""
        ...

    def count(self, rows: Sequence[Row]) -> float:
        """What the loss of these rows is divided by: rows, or response tokens."""
        return float(len(rows))

    def finish(self, model: Callable[..., Any], placement: Placement) -> dict[str, float]:
        """After training: figures to log, and whatever the model's config should carry."""
        return {}


class RowBatch:
    """Rows packed with their sequences sorted by length (equal ones share an attention call)."""

    def __init__(self, rows: Sequence[Row], index: Sequence[int], held_out: bool, placement: Placement) -> None:
        """index: positions of `rows` in their data set, for tables that are kept beside it."""
        self.rows, self.index, self.held_out = rows, list(index), held_out
        pairs = [(row.prompt, response) for row in rows for response in row.responses]
        self.order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        self.packed = PackedBatch.make(
            [torch.tensor(pairs[i][0] + pairs[i][1]) for i in self.order],
            [len(pairs[i][0]) for i in self.order], placement.device, placement.kernel,
        )  # fmt: skip
        self.place = torch.tensor(self.order).argsort().to(placement.device)

    def by_row(self, values: Tensor) -> Tensor:
        """One value a packed sequence -> [rows, responses a row]."""
        return values[self.place].view(len(self.rows), -1)

    def sequence_sums(self, token_values: Tensor) -> Tensor:
        """[R] -> [rows, responses a row]: sums over each response's tokens, in a fixed order."""
        return self.by_row(torch.segment_reduce(token_values, "sum", lengths=self.packed.cu_responses.diff()))

    @property
    def lengths(self) -> Tensor:
        """[rows, responses a row] fp32: response tokens."""
        return self.by_row(self.packed.cu_responses.diff()).float()

    @property
    def signs(self) -> Tensor:
        """[R] fp32: 1 on tokens of each row's first response, -1 on those of the others."""
        first = {0, *accumulate(len(row.responses) for row in self.rows)}
        of_sequences = torch.tensor([1.0 if i in first else -1.0 for i in self.order])
        lens = self.packed.cu_responses.diff()
        return torch.repeat_interleave(of_sequences.to(lens.device), lens)

    def looked_up(self, tables: tuple[Tensor, Tensor]) -> Tensor:
        """The rows' entries in a table kept beside the training or the held-out rows.

        A dummy's rows get some entry: its loss is weighted with zero.
        """
        return tables[self.held_out][self.index or [0] * len(self.rows)]
