"""The reward model's loss, with the margins of the data, against fp64 truth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from loop_helpers import write_rows
from transformers import AutoModelForSequenceClassification

from rto_fast.config import RMConfig
from rto_fast.errors import ConfigError, DataError
from rto_fast.supervised.reward_model import RewardModel, train_rm
from rto_fast.supervised.stage import RowBatch

MARGINS = [0.0, 1.5, -0.5, 3.0, 0.25, 2.0]


def small(tiny, output_dir, **settings) -> RMConfig:
    base = {
        "model": tiny.reward, "data": tiny.pairs, "output_dir": str(output_dir), "dtype": "fp32", "zero_stage": 0,
        "batch": 6, "lr": 1e-3, "max_length": 64, "gradient_checkpointing": False, "data_cache": False,
        "data_workers": 1, "epochs": 1.0, "eval_fraction": 0.0,
    }  # fmt: skip
    return RMConfig(**(base | settings))


def pairs_with(tiny, path, columns):
    """The first pairs, each with further columns."""
    rows = [json.loads(line) for line in Path(tiny.pairs).read_text().splitlines()]
    return write_rows(path, [row | more for row, more in zip(rows, columns, strict=False)])


def stage_of(config, monkeypatch) -> tuple[RewardModel, object]:
    """The stage and its placement as `train_rm` makes them."""
    made = []
    monkeypatch.setattr("rto_fast.supervised.reward_model.run_stage", lambda *args: made.append(args))
    train_rm(config)
    return made[0][2], made[0][1].placement


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_loss_and_gradient_with_margins_equal_the_fp64_formula(weight, tiny, tmp_path, one_rank, monkeypatch):
    data = pairs_with(tiny, tmp_path / "d.jsonl", [{"margin": m} for m in MARGINS])
    stage, placement = stage_of(small(tiny, tmp_path / "run", data=data, margin_weight=weight), monkeypatch)
    index = [4, 1, 3, 2, 5]  # not in the data's order
    rows = [stage.train[i] for i in index]
    total, _ = stage.loss(stage.model, RowBatch(rows, index, False, placement))
    total.backward()

    model = AutoModelForSequenceClassification.from_pretrained(tiny.reward, dtype=torch.float64)
    truth = torch.zeros((), dtype=torch.float64)
    for i, row in zip(index, rows, strict=True):
        scores = []
        for response in row.responses:
            ids = torch.tensor([row.prompt + response])
            scores.append(model.score(model.model(input_ids=ids).last_hidden_state[0, -1])[0])
        truth = truth + torch.log1p(torch.exp(-(scores[0] - scores[1] - weight * MARGINS[i])))
    truth.backward()
    assert total.item() == pytest.approx(truth.item(), rel=2e-5)
    ours = [p.grad.double() for p in stage.model.parameters() if p.grad is not None]
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    size = sum(float(g.square().sum()) for g in theirs) ** 0.5
    gap = sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True)) ** 0.5
    assert gap < 5e-5 * size


def truth_numbers(model, row):
    """[tokens] fp64 of each response: the head's number at each of its tokens."""
    return [
        model.score(model.model(input_ids=torch.tensor([row.prompt + r])).last_hidden_state[0])[len(row.prompt) :, 0]
        for r in row.responses
    ]


def test_q_rm_equals_the_fp64_formula_and_leaves_the_tokens_moments(tiny, tmp_path, one_rank, monkeypatch):
    """Its mean and std are of single tokens: what `--token-reward scalar:MODEL` reads."""
    settings = {"objective": "q_rm", "q_rm_beta": 0.7, "q_rm_gamma": 0.4, "eval_fraction": 0.2}
    stage, placement = stage_of(small(tiny, tmp_path / "run", **settings), monkeypatch)
    index = [4, 1, 3, 2, 5]
    rows = [stage.train[i] for i in index]
    assert len({len(r) for row in rows for r in row.responses}) > 2
    total, metrics = stage.loss(stage.model, RowBatch(rows, index, False, placement))
    total.backward()

    model = AutoModelForSequenceClassification.from_pretrained(tiny.reward, dtype=torch.float64)
    truth, right = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        chosen, rejected = (z.mean() for z in truth_numbers(model, row))
        right += int(chosen > rejected)
        truth = truth + torch.log1p(torch.exp(-(0.7 * (chosen - rejected) - 0.4)))
    truth.backward()
    assert total.item() == pytest.approx(truth.item(), rel=2e-5)
    assert metrics["accuracy"].item() == right
    ours = [p.grad.double() for p in stage.model.parameters() if p.grad is not None]
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    size = sum(float(g.square().sum()) for g in theirs) ** 0.5
    gap = sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True)) ** 0.5
    assert gap < 5e-5 * size

    found = stage.finish(stage.model, placement)
    with torch.no_grad():
        tokens = torch.cat([z for i in range(len(stage.held_out)) for z in truth_numbers(model, stage.held_out[i])])
    assert found["eval/score_mean"] == pytest.approx(tokens.mean().item(), rel=1e-4, abs=1e-5)
    assert found["eval/score_std"] == pytest.approx(tokens.std(correction=0).item(), rel=1e-4)
    assert (stage.model.mean, stage.model.std) == tuple(found.values())


def test_q_rm_trains(tiny, tmp_path, one_rank):
    folder = train_rm(small(tiny, tmp_path / "run", objective="q_rm", zero_stage=2, epochs=4.0, q_rm_gamma=0.0))
    losses = [json.loads(x)["train/loss"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert AutoModelForSequenceClassification.from_pretrained(folder).num_labels == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "q_rm", "margin_weight": 1.0}, "margin_weight: 1.0 is not read with --objective q_rm; its mar"),
        ({"q_rm_beta": 1.0}, "q_rm_beta: 1.0 is not read with --objective bradley_terry"),
        ({"objective": "q_rm", "q_rm_beta": 0.0}, "q_rm_beta: must be positive"),
        ({"objective": "q_rm", "q_rm_gamma": -1.0}, "q_rm_gamma: must not be negative"),
    ],
)
def test_what_q_rm_refuses(settings, message, tiny, tmp_path):
    with pytest.raises(ConfigError, match=f"^{message}"):
        small(tiny, tmp_path, **settings).validate()


def test_held_out_rows_have_their_own_margins(tiny, tmp_path, one_rank, monkeypatch):
    """A margin follows its row through skipped rows and the held-out share; scores stand for a margin."""
    scores = [{"score_chosen": 2.0 * i, "score_rejected": 1.0 * i} for i in range(12)]
    data = pairs_with(tiny, tmp_path / "d.jsonl", scores)
    everything, _ = stage_of(small(tiny, tmp_path / "all", data=data, margin_weight=0.5), monkeypatch)
    lengths = sorted(len(row.prompt) + max(map(len, row.responses)) for row in everything.train)
    config = small(tiny, tmp_path / "run", data=data, margin_weight=0.5, eval_fraction=0.25, max_length=lengths[8])
    stage, placement = stage_of(config, monkeypatch)
    assert 2 < len(stage.train) + len(stage.held_out) < 12
    known = {str(everything.train[i]): float(everything.margins[0][i]) for i in range(12)}
    assert sorted(known.values()) == [0.5 * i for i in range(12)]
    for rows, margins in zip((stage.train, stage.held_out), stage.margins, strict=True):
        assert [known[str(row)] for row in rows] == margins.tolist()
    batch = RowBatch(stage.held_out, range(len(stage.held_out)), True, placement)
    with torch.no_grad():
        total, _ = stage.loss(stage.model, batch)
        chosen, rejected = batch.by_row(stage.model(batch.packed, batch.packed.last_positions)).double().unbind(1)
    margin = torch.tensor([known[str(row)] for row in stage.held_out])
    assert total.item() == pytest.approx(torch.log1p(torch.exp(margin - (chosen - rejected))).sum().item(), rel=1e-5)


def test_a_margin_that_is_no_number_is_refused_with_its_row(tiny, tmp_path, one_rank):
    for columns, wrong in (
        ({"margin": None}, "line 2: 'margin' is 'None' where a finite number was expected"),
        ({"margin": float("nan")}, "line 2: 'margin' is 'nan' where"),
        ({"margin": True}, "line 2: 'margin' is 'True' where"),
        ({"margin": "much"}, "line 2: 'margin' is 'much' where"),
        ({}, "line 2: 'margin' is 'None' where"),
    ):
        data = pairs_with(tiny, tmp_path / "d.jsonl", [{"margin": 1.0}, columns, {"margin": "2.5"}])
        with pytest.raises(DataError, match=wrong):
            train_rm(small(tiny, tmp_path / "run", data=data, margin_weight=1.0))
    data = pairs_with(tiny, tmp_path / "d.jsonl", [{"score_chosen": 1e308, "score_rejected": -1e308}])
    with pytest.raises(DataError, match="line 1: 'score_chosen' - 'score_rejected' is inf where"):
        train_rm(small(tiny, tmp_path / "run", data=data, margin_weight=1.0))
    with pytest.raises(DataError, match="no column 'margin' and lacks one of 'score_chosen' and 'score_rejected'"):
        train_rm(small(tiny, tmp_path / "run", margin_weight=1.0))
    with pytest.raises(ConfigError, match="margin_weight: must not be negative, got -1"):
        small(tiny, tmp_path, margin_weight=-1.0).validate()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
