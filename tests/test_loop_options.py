"""Options of the loop on a tiny model: the average, the critic's warm-up, PPO epochs, several responses, bad steps."""

from __future__ import annotations

import json

import pytest
import torch
from loop_helpers import small_run
from safetensors.torch import load_file


def figures(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_rto(tiny, folder, **settings):
    from rto_fast import trainer
    from rto_fast.config import RTOConfig

    return trainer.train(RTOConfig(**small_run(tiny, folder, prompt_key="prompt", **settings)))


def test_average_of_the_policy(tiny, tmp_path, monkeypatch):
    """average <- 0.75 * average + 0.25 * weights after each iteration, the first one copied."""
    from rto_fast.build import Run

    seen, push = [], Run.push_weights

    def watched(run):
        seen.append({name: tensor.clone() for name, tensor in run.policy.weights()})
        return push(run)

    monkeypatch.setattr(Run, "push_weights", watched)
    run_rto(tiny, tmp_path / "run", iterations=3, ema_decay=0.75, policy_lr=1e-3)
    ema = load_file(tmp_path / "run" / "ema" / "model.safetensors")
    for name, tensor in ema.items():
        expected = seen[0][name]
        for weights in seen[1:]:
            expected = 0.75 * expected + 0.25 * weights[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    assert any((ema[n] != seen[-1][n]).any() for n in ema)


def test_warm_up_trains_the_critic_alone(tiny, tmp_path):
    run_rto(tiny, tmp_path / "run", iterations=2, critic_warmup=2, policy_lr=1e-2, critic_lr=1e-2)
    policy, start = (load_file(f"{f}/model.safetensors") for f in (tmp_path / "run" / "policy", tiny.policy))
    critic, reward = (load_file(f"{f}/model.safetensors") for f in (tmp_path / "run" / "critic", tiny.reward))
    assert all((policy[n] == start[n]).all() for n in policy)
    assert any((critic[n] != reward[n]).any() for n in critic)
    assert all("policy/loss" not in row for row in figures(tmp_path / "run"))


def test_the_policys_schedule_starts_after_the_warm_up(tiny, tmp_path):
    run_rto(tiny, tmp_path / "run", iterations=3, critic_warmup=1, policy_lr=1e-3, warmup_ratio=0.0, lr_floor=0.0)
    rows = figures(tmp_path / "run")
    # 2 updates an iteration, 2 iterations: the logged rate is that of each iteration's second update.
    assert [row.get("policy/lr") for row in rows] == [
        None, pytest.approx(1e-3 * 0.5 * (1 + 2**-0.5)), pytest.approx(1e-3 * 0.5 * (1 - 2**-0.5)),
    ]  # fmt: skip


def test_ppo_epochs_go_over_the_rollout_again_in_another_order(tiny, tmp_path, monkeypatch):
    from rto_fast.build import Run

    asked, batches = [], Run.train_batches

    def watched(run, iteration, epoch, responses):
        asked.append(batches(run, iteration, epoch, responses))
        return asked[-1]

    monkeypatch.setattr(Run, "train_batches", watched)
    run_rto(tiny, tmp_path / "run", iterations=1, ppo_epochs=3, policy_lr=1e-3)
    assert len(asked) == 3
    assert all(sorted(i for batch in epoch for i in batch) == list(range(8)) for epoch in asked)
    assert asked[0] != asked[1]
    assert figures(tmp_path / "run")[0]["policy/ratio_max"] > 1


def test_several_responses_share_a_prompt_and_no_seed(tiny, tmp_path):
    run = run_rto(tiny, tmp_path / "run", rollout_batch=4, responses_per_prompt=3, train_batch=6, iterations=1)
    requests = run.requests(0)
    assert len(requests) == 12
    for i in range(0, 12, 3):
        group = requests[i : i + 3]
        assert len({r.prompt for r in group}) == len({r.sample_index for r in group}) == 1
        assert [r.response_index for r in group] == [0, 1, 2]
    assert len({r.seed for r in requests}) == 12
    assert run.requests(0) == requests != run.requests(1)


BROKEN = """
calls = 0
def sometimes(prompts, responses):
    global calls
    calls += 1
    return [float("nan") if calls in BAD else float(len(r)) for r in responses]
"""


@pytest.fixture
def broken_reward(tmp_path):
    """broken_reward(calls) -> a reward function that gives NaN in those calls (from 1)."""

    def make(*calls):
        path = tmp_path / f"broken_{'_'.join(map(str, calls))}.py"
        path.write_text(f"BAD = {calls!r}\n{BROKEN}")
        return (f"{path}:sometimes",)

    return make


def test_a_rollout_without_a_finite_score_is_skipped_and_counted(tiny, tmp_path, broken_reward):
    run_rto(tiny, tmp_path / "run", iterations=3, reward_model=(), reward_fn=broken_reward(2), policy_lr=1e-3)
    rows = figures(tmp_path / "run")
    assert [row["bad_steps"] for row in rows] == [0, 1, 1]
    assert "policy/loss" in rows[0]
    assert "policy/loss" not in rows[1]
    assert "policy/loss" in rows[2]
    state = load_file(tmp_path / "run" / "policy" / "model.safetensors")
    assert all(torch.isfinite(t).all() for t in state.values())


def test_bad_steps_in_a_row_stop_the_run_and_leave_the_checkpoint(tiny, tmp_path, broken_reward):
    from rto_fast.engine import Diverged, checkpoint_steps

    with pytest.raises(Diverged, match=r"2 bad steps in a row.*rollout 3 gave 8 non-finite score"):
        run_rto(
            tiny, tmp_path / "run", iterations=5, reward_model=(), reward_fn=broken_reward(2, 3), max_bad_steps=2,
            save_every=1,
        )  # fmt: skip
    assert checkpoint_steps(tmp_path / "run" / "checkpoints")[-1] == 2


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_gradient_that_is_not_finite_moves_nothing(tiny, tmp_path, stage, monkeypatch):
    """An infinite advantage makes the policy's loss and gradient NaN; the critic's are untouched."""
    from rto_fast import algo

    honest = algo.policy_loss

    def broken(logp, entropy, old_logp, advantages, *rest):
        return honest(logp, entropy, old_logp, advantages + float("inf"), *rest)

    monkeypatch.setattr(algo, "policy_loss", broken)
    run_rto(tiny, tmp_path / "run", iterations=1, zero_stage=stage, policy_lr=1e-2, max_bad_steps=0)
    policy, start = (load_file(f"{f}/model.safetensors") for f in (tmp_path / "run" / "policy", tiny.policy))
    assert all((policy[n] == start[n]).all() for n in policy)
    critic, reward = (load_file(f"{f}/model.safetensors") for f in (tmp_path / "run" / "critic", tiny.reward))
    assert any((critic[n] != reward[n]).any() for n in critic)
    assert figures(tmp_path / "run")[0]["bad_steps"] == 1
