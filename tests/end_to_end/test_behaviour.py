"""The sampler's log-probs as the behaviour's: the update against fp64 formulas, and whole runs."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from loop_helpers import ROOT, small_run, watched_gradients
from test_loop_math import (
    RESPONSES,
    TRAINED,
    aggregate,
    assert_update,
    by_sequence,
    clip,
    make_rollout,
    model_at,
    move,
    token_logps,
    truth_from,
)

from rto_fast import build, trainer
from rto_fast.config import RTOConfig
from rto_fast.contract import ResponseTexts
from rto_fast.errors import ConfigError, SyncError
from rto_fast.metrics import not_finite, of_sampled_policy, of_sampler
from rto_fast.rollout.transformers_engine import TransformersEngine
from rto_fast.scoring.score import score_rollout
from rto_fast.trainer import compute_targets
from rto_fast.updates.sampler_corrected import SamplerBatch

CASES = {
    "skipped": {"is_cap": 1.1},
    "skipped, token mean": {"is_cap": 0.0, "loss_aggregation": "token", "micro_tokens": 1, "entropy_coef": 0.1},
    "temperature": {"is_cap": 1.1, "temperature": 0.7},
}


@pytest.fixture(scope="module", params=CASES)
def case(request, one_rank, tiny, tmp_path_factory):
    """(run, rollout, scores, targets) of a sampler whose log-probs are the policy's and some noise."""
    folder = tmp_path_factory.mktemp("run")
    config = RTOConfig(**small_run(tiny, folder, behaviour_logp="sampler", sync_proof=False, **CASES[request.param]))
    run, rollout = build.build(config), make_rollout()
    with torch.no_grad():
        own = token_logps(model_at(tiny.policy), rollout, config.temperature)[0]
    own = torch.tensor([float(x) for row in own for x in row])
    noise = 0.15 * torch.randn(own.shape, generator=torch.Generator().manual_seed(3))
    rollout = dataclasses.replace(rollout, sampler_logp=own + noise)
    texts = ResponseTexts(["p"] * 8, ["x" * n for n in RESPONSES], [[]] * 8)
    scores, _ = score_rollout(rollout, texts, run.scorers, config, run.placement, lambda tokens: None)
    yield run, rollout, scores, compute_targets(rollout, scores, config, run.state.kl.beta2)
    run.logger.close()


def update_in_fp64(c, model, old_logp, part, truth):
    """-w * min(ratio * A, clipped ratio * A) with w = min(exp(old - sampler), cap): figures, gradients, log-probs."""
    logps, entropies = token_logps(model, part, c.temperature)
    sampler = [row.tolist() for row in part.sampler_logp.double().split(part.response_lens.tolist())]
    losses, ratios, cut, weights, capped = [], [], [], [], []
    for row, i in enumerate(TRAINED):
        advantages = [(a - truth.mean) * truth.rstd for a in truth.advantages[i]]
        old = [x.item() for x in logps[row]] if old_logp is None else old_logp[row]
        ratio = [(logps[row][t] - old[t]).exp() for t in range(RESPONSES[i])]
        bounded = [clip(r, torch.tensor(1 - c.clip), torch.tensor(1 + c.clip)) for r in ratio]
        raw = [math.exp(o - s) for o, s in zip(old, sampler[row], strict=True)]
        weights.append([min(w, c.is_cap) if c.is_cap else w for w in raw])
        capped.append([float(c.is_cap > 0 and w > c.is_cap) for w in raw])
        tokens = zip(weights[-1], ratio, bounded, advantages, strict=True)
        losses.append([-w * min(r * a, b * a) for w, r, b, a in tokens])
        ratios.append([r.item() for r in ratio])
        cut.append([float(b * a < r * a) for r, b, a in zip(ratio, bounded, advantages, strict=True)])
    loss = aggregate(losses, c.loss_aggregation) - c.entropy_coef * aggregate(entropies, c.loss_aggregation)
    loss.backward()
    figures = {
        "loss": loss.item(),
        "policy/clip_fraction": aggregate(cut, c.loss_aggregation),
        "policy/ratio_mean": aggregate(ratios, c.loss_aggregation),
        "sampler/weight_mean": aggregate(weights, c.loss_aggregation),
        "sampler/weight_clip_fraction": aggregate(capped, c.loss_aggregation),
    }
    return figures, {n: p.grad for n, p in model.named_parameters()}, [[x.item() for x in row] for row in logps]


def test_scores_and_two_passes(case, tiny):
    """The forward is skipped where it can be; the first pass over a batch sets old_logp, the second is clipped."""
    run, rollout, scores, targets = case
    c = run.config
    if c.temperature == 1:
        assert scores.old_logp.isnan().all()
        assert torch.equal(scores.policy_logp.cpu(), rollout.sampler_logp)
        assert of_sampler(rollout, scores) == {}
    else:
        known = of_sampler(rollout, scores)
        assert known["sampler/logp_diff_max"] == pytest.approx(
            float((scores.old_logp.cpu() - rollout.sampler_logp).abs().max())
        )
        start = model_at(tiny.policy)
        for actual, temperature in ((scores.old_logp, 0.7), (scores.policy_logp, 1.0)):
            with torch.no_grad():
                rows = token_logps(start, rollout, temperature)[0]
            truth = torch.tensor([float(x) for row in rows for x in row], dtype=torch.float64)
            torch.testing.assert_close(actual.double(), truth, atol=2e-5, rtol=1e-5)
    assert not_finite(scores) == ""
    truth, part = truth_from(c, scores), rollout.select(TRAINED)
    batch = SamplerBatch(run, rollout, scores, targets, TRAINED)
    old = None
    if c.temperature != 1:
        rows = by_sequence(scores.old_logp)
        old = [rows[i] for i in TRAINED]
    for number in range(2):
        weights = move(run.policy, 11 + number, 0.02)
        with watched_gradients(run.policy) as gradients:
            update = batch.update_policy(number)
        figures, expected, logps = update_in_fp64(c, model_at(tiny.policy, weights), old, part, truth)
        if old is None:
            assert figures["policy/ratio_mean"] == 1
            old = logps
        else:
            assert 0.05 < figures["policy/clip_fraction"] < 0.95
        if c.is_cap:
            assert 0.02 < figures["sampler/weight_clip_fraction"] < 0.98
        assert_update(update, gradients, (figures, expected), of_sampled_policy([update]))
    untouched = [i for i in range(8) if i not in TRAINED]
    if c.temperature == 1:
        assert scores.old_logp[rollout.response_index(untouched)].isnan().all()


# Whole runs


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_exact_sampler_changes_nothing(tiny, one_rank, tmp_path):
    """One update a rollout, and a sampler that is the trainer but for rounding: the run is the usual one."""
    settings = {"rollout_engine": "transformers", "train_batch": 8, "policy_lr": 1e-3, "iterations": 3}
    for name in ("trainer", "sampler"):
        trainer.train(RTOConfig(**small_run(tiny, tmp_path / name, behaviour_logp=name, **settings)))
    usual, ours = rows(tmp_path / "trainer"), rows(tmp_path / "sampler")
    for a, b in zip(usual, ours, strict=True):
        for key in ("reward/total", "kl/response", "policy/loss", "policy/grad_norm", "critic/loss"):
            assert b[key] == pytest.approx(a[key], rel=2e-3, abs=2e-4), key
        assert b["sampler/weight_mean"] == pytest.approx(1, abs=1e-4)
        assert b["sampler/logp_diff_max"] < 1e-4
        assert b["rollout/lag"] == 0
    assert usual[-1]["kl/response"] > 0.01


@pytest.mark.parametrize("behaviour", ["trainer", "sampler"])
def test_a_least_response_length_keeps_the_ratio_and_the_check(behaviour, tiny, one_rank, tmp_path):
    """The policy's own log-probs are the ratio's and the KL term's; the check leaves out where no stop was allowed."""
    settings = {"rollout_engine": "transformers", "train_batch": 8, "policy_lr": 1e-3, "behaviour_logp": behaviour}
    seen = []

    def observe(rollout, texts):
        seen.append(rollout)
        return {}

    for least in (0, 6):
        config = small_run(tiny, tmp_path / str(least), min_response_length=least, rollout_batch=16, **settings)
        trainer.train(RTOConfig(**config | {"train_batch": 16}), observe)
    assert min(int(r.response_lens.min()) for r in seen[:2]) <= 6
    assert min(int(r.response_lens.min()) for r in seen[2:]) >= 7
    for row in rows(tmp_path / "6"):
        assert row["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert row["sampler/logp_diff_max"] < 1e-4
    first = rows(tmp_path / "6")[0]
    assert first["kl/response"] == pytest.approx(0, abs=1e-4)  # policy and reference are one model
    if behaviour == "sampler":
        assert first["sampler/weight_mean"] < 0.999  # what the stop tokens had


@pytest.mark.slow
def test_two_passes_on_two_ranks_are_those_of_one(tiny, launch, tmp_path):
    """The second pass deals the sequences out anew: each rank must know what another has seen."""
    settings = {"rollout_engine": "transformers", "behaviour_logp": "sampler", "ppo_epochs": 2, "policy_lr": 3e-3,
                "micro_tokens": 32}  # fmt: skip
    for ranks in (1, 2):
        config = small_run(tiny, tmp_path / str(ranks), **settings)
        result = launch([ROOT / "tests" / "vllm_worker.py", json.dumps([config])], ranks=ranks)
        assert result.returncode == 0, result.output
    for a, b in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        for key in ("policy/loss", "policy/ratio_max", "policy/grad_norm", "sampler/weight_mean"):
            assert b[key] == pytest.approx(a[key], rel=2e-3, abs=1e-5), key
        assert a["policy/ratio_max"] > 1.001


def test_a_stale_sampler_is_found_by_the_first_updates_forward(tiny, one_rank, tmp_path, monkeypatch):
    """The engine samples with noise on its weights, although every push went well."""
    plain = TransformersEngine.generate

    def generate(engine, requests, *rest):
        if engine.version >= 1:
            with torch.no_grad():
                next(engine.model.parameters()).mul_(1.3)
        return plain(engine, requests, *rest)

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    config = small_run(tiny, tmp_path, rollout_engine="transformers", behaviour_logp="sampler")
    with pytest.raises(SyncError, match="the sampler is not the policy"):
        trainer.train(RTOConfig(**config))
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("engine", ["auto", "transformers", "vllm"])
def test_a_lag_needs_an_engine_of_its_own(tiny, tmp_path, engine):
    config = RTOConfig(**small_run(tiny, tmp_path, rollout_engine=engine, rollout_lag=1))
    with pytest.raises(ConfigError, match=r"rollout_lag: an engine in the training process \('" + engine):
        build.build(config)
    assert not any(tmp_path.iterdir())


def test_pairs_have_no_correction(tiny, tmp_path):
    settings = {"policy_update": "rebel", "responses_per_prompt": 2, "behaviour_logp": "sampler"}
    with pytest.raises(ConfigError, match="behaviour_logp: rebel has no correction"):
        RTOConfig(**small_run(tiny, tmp_path, **settings)).validate()
