"""The running scale of scores: its moments in fp64, what the loop does with it, and a resumed run's bits."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from loop_helpers import small_run
from safetensors.torch import load_file

from rto_fast import trainer
from rto_fast.algo.targets import RunningScale
from rto_fast.config import RTOConfig


def test_moments_are_those_of_all_scores_so_far():
    draw, seen, scale = torch.Generator().manual_seed(0), [], RunningScale()
    for count in (1, 7, 3, 64):
        scores = 1000 + 3 * torch.randn(count, generator=draw)
        seen += scores.tolist()
        scale.update(scores)
        assert scale.mean == pytest.approx(statistics.mean(seen), rel=1e-12)
        assert scale.deviation == pytest.approx(statistics.stdev(seen) if len(seen) > 1 else 1.0, rel=1e-9)


def test_equal_scores_are_left_as_they_are():
    scale = RunningScale()
    for _ in range(2):
        scale.update(torch.full((4,), 0.3))
    assert scale.deviation == 1.0


def run_of(tiny, folder, **settings):
    base = {
        "iterations": 3,
        "score_scale": "running",
        "beta1": 0.0,
        "beta2": 0.0,
        "dpo_model": (),
        "save_every": 2,
        "score_clip": 0.0,
    }
    return RTOConfig(**(small_run(tiny, folder, prompt_key="prompt", policy_lr=1e-3) | base | settings))


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory, one_rank):
    """(folder of an uninterrupted run, the scores of its rollouts)."""
    folder, scores = tmp_path_factory.mktemp("scale") / "whole", []
    learn = trainer.learn_token_reward

    def listening(run, iteration, rollout, found):
        scores.append(found.score.clone())
        return learn(run, iteration, rollout, found)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "learn_token_reward", listening)
        trainer.train(run_of(tiny, folder))
    return folder, scores


def test_the_loop_pays_scores_divided_by_their_deviation_so_far(whole):
    folder, scores = whole
    for i, row in enumerate(rows(folder)):
        deviation = float(torch.cat(scores[: i + 1]).double().std())
        assert row["reward/score_deviation"] == pytest.approx(deviation, rel=1e-6)
        assert row["reward/score"] == pytest.approx(float(scores[i].mean()), abs=1e-6)
        assert row["reward/total"] == pytest.approx(float(scores[i].mean()) / deviation, abs=1e-5)


def test_the_clip_bounds_what_was_scaled(tiny, tmp_path, one_rank):
    config = run_of(tiny, tmp_path / "run", score_clip=0.5, iterations=1)
    seen = []
    compute = trainer.compute_targets

    def listening(rollout, scores, *rest):
        targets = compute(rollout, scores, *rest)
        seen.append((scores.score, torch.segment_reduce(targets.rewards, "sum", lengths=rollout.response_lens)))
        return targets

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "compute_targets", listening)
        trainer.train(config)
    ((scaled, paid),) = seen
    assert float(scaled.double().std()) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(paid, scaled.clamp(-0.5, 0.5))
    assert (paid != scaled).any()


def test_resumed_bit_for_bit(whole, tiny, tmp_path):
    folder, _ = whole

    def stops(run, iteration, *more, turn=trainer.rto_iteration):
        if iteration == 2:
            raise KeyboardInterrupt
        return turn(run, iteration, *more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "rto_iteration", stops)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(run_of(tiny, tmp_path / "cut"))
    trainer.train(run_of(tiny, tmp_path / "cut", resume="auto"))
    for name in ("policy", "critic"):
        ours, theirs = (load_file(f / name / "model.safetensors") for f in (tmp_path / "cut", folder))
        assert all(torch.equal(ours[n], tensor) for n, tensor in theirs.items()), name
    for mine, other in zip(rows(tmp_path / "cut"), rows(folder), strict=True):
        assert mine["reward/score_deviation"] == other["reward/score_deviation"]


def test_off_is_no_metric_and_no_state(tiny, tmp_path, one_rank):
    run = trainer.train(run_of(tiny, tmp_path / "run", score_scale="off", iterations=1))
    assert run.state.scale == RunningScale()
    assert "reward/score_deviation" not in rows(tmp_path / "run")[0]
