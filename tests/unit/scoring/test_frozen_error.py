"""Quantised frozen models in the loop: their error is measured, and nothing else changes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from loop_helpers import small_run, stand_in_code

from rto_fast import build, trainer
from rto_fast import run as run_module
from rto_fast.config import RTOConfig
from rto_fast.errors import ConfigError
from rto_fast.models import load
from rto_fast.models.attention import PACKED
from rto_fast.models.load import load_policy
from rto_fast.models.packing import PackedBatch
from rto_fast.models.quantised import CODES


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@torch.no_grad()
def logps(path: str, rollout, dtype: torch.dtype) -> torch.Tensor:
    model = load_policy(path, dtype=torch.float32, attention=PACKED, argument="model")
    for module in model.lm.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.to(dtype).float()
    return model(PackedBatch.make(rollout.sequences(), rollout.prompt_lens.tolist(), torch.device("cpu"), "sdpa"))


def test_the_error_is_that_of_the_token_reward(tiny, tmp_path, monkeypatch, one_rank, capsys):
    """Against models that this test loads and rounds itself, at the policy's own responses."""
    monkeypatch.setitem(CODES, "int8", stand_in_code(torch.bfloat16))
    seen = []
    plain = run_module.frozen_error
    monkeypatch.setattr(run_module, "frozen_error", lambda rollout, *a: seen.append(rollout) or plain(rollout, *a))
    homes, load_whole = [], load._load
    monkeypatch.setattr(load, "_load", lambda auto, path, argument, placement, home, **k: (
        homes.append((argument, home)) or load_whole(auto, path, argument, placement, home, **k)
    ))  # fmt: skip
    config = RTOConfig(**small_run(tiny, tmp_path, frozen_dtype="int8", score_tokens=64, park_frozen=True))
    run = build.build(config)
    trained = [("policy", "device"), ("reward_model", "device")]  # the critic starts from the reward model
    measured = [(name, "host") for name in ("reference", "dpo_model", "reward_model")]
    assert homes[:5] == [*trained, *measured]
    assert {home for _, home in homes[5:]} == {"host"}, "whole models, to measure against"
    (rollout,) = seen
    ours, whole = (
        [logps(path, rollout, dtype) for path in (tiny.dpo, tiny.policy)] for dtype in (torch.bfloat16, torch.float32)
    )
    gaps = {"token_reward": (ours[0] - ours[1]) - (whole[0] - whole[1]), "ref_logp": ours[1] - whole[1]}
    for name, gap in gaps.items():
        assert run.frozen_error[f"frozen/{name}_error_mean"] == pytest.approx(float(gap.abs().mean()), rel=1e-2)
        assert run.frozen_error[f"frozen/{name}_error_max"] == pytest.approx(float(gap.abs().max()), rel=1e-2)
    assert run.frozen_error["frozen/score_error_max"] > 0
    said = capsys.readouterr().out
    assert "frozen models in int8 against fp32, 8 responses: token rewards by" in said
    assert "the reference's log-probs by" in said
    assert "a token reward is bounded by 1" in said
    assert all(type(m.module).__name__ in ("PolicyModel", "ScalarModel") for m in run.scorers.frozen)  # put back
    run.logger.close()


def test_a_code_that_loses_nothing_changes_nothing(tiny, tmp_path, monkeypatch, one_rank):
    """Two iterations: the figures of a run without, and errors of 0 in every row."""
    monkeypatch.setitem(CODES, "int8", stand_in_code(torch.float32))
    for name in ("off", "int8"):
        trainer.train(RTOConfig(**small_run(tiny, tmp_path / name, frozen_dtype=name)))
    off, coded = rows(tmp_path / "off"), rows(tmp_path / "int8")
    errors = [{k: row.pop(k) for k in list(row) if k.startswith("frozen/")} for row in coded]
    assert [set(e.values()) for e in errors] == [{0.0}] * 2
    assert not [k for row in off for k in row if k.startswith("frozen/")]
    learnt = ("policy/", "critic/", "kl/", "reward/", "value")
    for ours, theirs in zip(coded, off, strict=True):
        assert {k: v for k, v in ours.items() if k.startswith(learnt)} == {
            k: v for k, v in theirs.items() if k.startswith(learnt)
        }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 3}, "int8 weights cannot be spread over ranks; leave out --zero-stage 3"),
        ({"partition_frozen": "yes"}, "int8 weights cannot be spread over ranks; leave out --partition-frozen yes"),
    ],
)
def test_what_takes_weights_apart_is_refused(settings, message):
    config = RTOConfig(policy="p", dpo_model="d", reward_model=("r",), data="x")
    with pytest.raises(ConfigError, match=f"^frozen_dtype: {message}"):
        dataclasses.replace(config, frozen_dtype="int8", **settings).validate()
    dataclasses.replace(config, **settings).validate()
