"""The demo end to end, small: every stage runs, the table is there, a second call only judges again."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    from rto_fast.demo.config import DemoConfig

    return DemoConfig(
        output_dir=str(tmp_path_factory.mktemp("demo") / "out"), corpus_rows=320, pairs=128, prompts=64,
        eval_prompts=32, iterations=3, rollout_batch=16, train_batch=8, stage_epochs=1.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(small_demo):
    from rto_fast.demo.pipeline import run

    return run(small_demo)


def test_every_model_is_judged(results, small_demo):
    from pathlib import Path

    root = Path(small_demo.output_dir)
    assert list(results) == ["SFT", "DPO", "PPO", "RTO"]
    assert results["SFT"].win_rate == 0.5
    assert results["SFT"].kl == pytest.approx(0, abs=1e-4)
    assert all(results[name].kl != 0 for name in ("DPO", "PPO", "RTO"))
    written = json.loads((root / "results.json").read_text())
    assert written["RTO"]["true_reward"] == results["RTO"].true_reward
    page = (root / "report.html").read_text()
    assert "True reward against samples" in page
    assert "Judged by the true reward" in page


def test_the_arms_differ_in_the_token_reward_alone(small_demo):
    import dataclasses
    from pathlib import Path

    from rto_fast.demo.pipeline import rl_config

    ppo, rto = (dataclasses.asdict(rl_config(small_demo, Path(small_demo.output_dir), arm)) for arm in ("PPO", "RTO"))
    assert {name for name in ppo if ppo[name] != rto[name]} == {"beta1", "dpo_model", "output_dir"}


def test_first_rollouts_are_the_same_samples(results, small_demo):
    """Before the first update both arms hold the same policy and draw with the same seeds."""
    from pathlib import Path

    from rto_fast.logs.files import METRICS, read_metrics

    ppo, rto = (read_metrics(Path(small_demo.output_dir) / arm / METRICS)[0] for arm in ("ppo", "rto"))
    assert ppo["true/reward"] == rto["true/reward"]
    assert ppo["reward/score"] == rto["reward/score"]
    assert ppo["reward/dpo"] == 0
    assert rto["reward/dpo"] != 0


def test_run_again_trains_nothing(results, small_demo):
    from pathlib import Path

    from rto_fast.demo.pipeline import run

    weights = Path(small_demo.output_dir) / "rto" / "policy" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert run(small_demo) == results
    assert weights.stat().st_mtime_ns == before


def test_other_settings_are_refused(results, small_demo):
    import dataclasses

    from rto_fast.demo.pipeline import run
    from rto_fast.errors import ConfigError

    with pytest.raises(ConfigError, match=r"beta2=0\.05 \(now 0\.5\)"):
        run(dataclasses.replace(small_demo, beta2=0.5))
