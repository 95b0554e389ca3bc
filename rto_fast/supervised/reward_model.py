"""The reward model's stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rto_fast import distributed
from rto_fast.algo import preference
from rto_fast.backend.output_lock import alone
from rto_fast.config import RMConfig
from rto_fast.data.load import PreferenceData, load_preferences
from rto_fast.models.heads import ScalarModel
from rto_fast.models.load import is_reward_model, load_config, load_scalar, new_scalar
from rto_fast.models.packing import Placement
from rto_fast.supervised.loop import held_out_batches
from rto_fast.supervised.pair_objectives import pair_rows
from rto_fast.supervised.prepare import prepare, run_stage
from rto_fast.supervised.stage import Row, RowBatch, Stage, Sums


class RewardModel(Stage):
    """Bradley-Terry on the scores at the last tokens; leaves the scores' mean and std in the model."""

    name = "reward model"

    def __init__(
        self, model: nn.Module, train: Sequence[Row], held_out: Sequence[Row],
        margins: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """margins: of the training and the held-out rows, [rows] fp32 each; None = off."""
        self.model, self.train, self.held_out, self.margins = model, train, held_out, margins

    def loss(self, model: Callable[..., Any], batch: RowBatch) -> tuple[Tensor, Sums]:
        chosen, rejected = batch.by_row(model(batch.packed, batch.packed.last_positions)).unbind(1)
        margin = None if self.margins is None else batch.looked_up(self.margins).to(chosen)
        loss = preference.bradley_terry_loss(chosen, rejected, margin)
        return loss.sum(), {"accuracy": (chosen > rejected).float().sum(), "margin": (chosen - rejected).sum()}

    def numbers(self, model: Callable[..., Any], batch: RowBatch) -> Tensor:
        """What a user of the model reads of the batch: scores of whole responses here, fp32."""
        return model(batch.packed, batch.packed.last_positions)

    @torch.no_grad()
    def finish(self, model: Callable[..., Any], placement: Placement) -> dict[str, float]:
        """Mean and std of all held-out numbers, so that a user of the model can normalise its output."""
        if not self.held_out:
            return {}
        moments = torch.zeros(3, dtype=torch.float64)
        for batch in held_out_batches(self.held_out, placement):
            scores = self.numbers(model, batch).double().cpu()
            if batch.index:
                moments += torch.stack([torch.tensor(float(scores.numel())), scores.sum(), scores.square().sum()])
        count, total, square = distributed.sum_over_ranks(moments).tolist()
        mean = total / count
        std = max(square / count - mean**2, 1e-12) ** 0.5
        self.model.mean, self.model.std = mean, std
        return {"eval/score_mean": mean, "eval/score_std": std}


class TokenRewardModel(RewardModel):
    """Q-RM on the means of the numbers at all response tokens; leaves the tokens' mean and std in the model."""

    name = "token reward model"

    def __init__(self, model: nn.Module, train: Sequence[Row], held_out: Sequence[Row], config: RMConfig) -> None:
        super().__init__(model, train, held_out)
        self.config = config

    def loss(self, model: Callable[..., Any], batch: RowBatch) -> tuple[Tensor, Sums]:
        chosen, rejected = (batch.sequence_sums(self.numbers(model, batch)) / batch.lengths).unbind(1)
        loss = preference.q_rm_loss(chosen, rejected, beta=self.config.q_rm_beta, gamma=self.config.q_rm_gamma)
        return loss.sum(), {"accuracy": (chosen > rejected).float().sum(), "margin": (chosen - rejected).sum()}

    def numbers(self, model: Callable[..., Any], batch: RowBatch) -> Tensor:
        return model(batch.packed, batch.packed.state_positions + 1)


@alone
def train_rm(config: RMConfig) -> Path:
    """Reward model from preference pairs; returns the model's folder."""
    common = prepare(config)
    parts = load_preferences(config, common.tokenizer, common.template)
    train, held_out = map(pair_rows, parts)
    margins = _margins(config.margin_weight, *parts) if config.margin_weight else None
    if not held_out and distributed.rank() == 0:
        print("warning: no pair is held out: the scores are not measured, their mean and std stay 0 and 1", flush=True)

    torch.manual_seed(config.seed)
    model = start_of(config.model, common.loading)
    if config.objective == "q_rm":
        return run_stage(config, common, TokenRewardModel(model, train, held_out, config))
    return run_stage(config, common, RewardModel(model, train, held_out, margins))


def _margins(weight: float, train: PreferenceData, held_out: PreferenceData) -> tuple[Tensor, Tensor]:
    """The weighted margins, [rows] fp32 each."""
    first, second = (torch.from_numpy(weight * part.margins).float() for part in (train, held_out))
    return first, second


def start_of(path: str, loading: dict[str, Any]) -> ScalarModel:
    """A reward model goes on with its own head, on raw scores; any other model gets a new one. Says which."""
    kept = is_reward_model(path, "model")
    if kept:
        model = load_scalar(path, argument="model", **loading)
        model.mean, model.std = 0.0, 1.0  # of the scores before this training
    else:
        hidden = load_config(path, "model").get_text_config(decoder=True).hidden_size
        model = new_scalar(path, argument="model", head_std=1 / (hidden + 1), **loading)
    if distributed.rank() == 0:
        print(f"reward head: {'that of the reward model' if kept else 'a new one on'} {path}", flush=True)
    return model
