"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rto_fast.backend.output_lock import alone
from rto_fast.config import SFTConfig
from rto_fast.data.load import load_sft
from rto_fast.models.load import load_policy
from rto_fast.supervised.prepare import prepare, run_stage
from rto_fast.supervised.stage import Row, RowBatch, Rows, Stage, Sums


class SFT(Stage):
    """Mean negative log-prob of response tokens."""

    name = "SFT"

    def __init__(self, model: nn.Module, train: Sequence[Row], held_out: Sequence[Row]) -> None:
        self.model, self.train, self.held_out = model, train, held_out

    def loss(self, model: Callable[..., Any], batch: RowBatch) -> tuple[Tensor, Sums]:
        return -model(batch.packed).sum(), {}

    def count(self, rows: Sequence[Row]) -> float:
        return float(sum(len(r) for row in rows for r in row.responses))


@alone
def train_sft(config: SFTConfig) -> Path:
    """Supervised fine-tuning; returns the model's folder. Raises ConfigError on input that cannot work."""
    common = prepare(config)
    parts = load_sft(config, common.tokenizer, common.template)
    train, held_out = (Rows(part.prompt_ids, part.response_ids) for part in parts)
    model = load_policy(config.model, argument="model", **common.loading)
    return run_stage(config, common, SFT(model, train, held_out))
