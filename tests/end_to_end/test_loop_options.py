"""Options of the loop on a tiny model: the average, the critic's warm-up, PPO epochs, several responses, bad steps."""

from __future__ import annotations

import json

import pytest
import torch
from loop_helpers import ROOT, small_run
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_rank")


def figures(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_rto(tiny, folder, **settings):
    from rto_fast import trainer
    from rto_fast.config import RTOConfig

    return trainer.train(RTOConfig(**small_run(tiny, folder, prompt_key="prompt", **settings)))


def test_average_of_the_policy(tiny, tmp_path, monkeypatch):
    """average <- 0.75 * average + 0.25 * weights after each iteration, the first one copied."""
    from rto_fast.run import Run

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


@pytest.mark.parametrize("holds", [True, False])
def test_the_average_comes_back_to_the_rank_that_keeps_it(tiny, tmp_path, monkeypatch, holds):
    """On the others it would take the memory of a model in fp32 for nothing."""
    from rto_fast import build
    from rto_fast.backend.weight_average import WeightAverage
    from rto_fast.config import RTOConfig

    settings = {"iterations": 1, "save_every": 1, "ema_decay": 0.75, "report": False, "sync_proof": False}
    saved = run_rto(tiny, tmp_path / "run", **settings).average.weights
    monkeypatch.setattr(build, "WeightAverage", lambda decay, **_: WeightAverage(decay, holds=holds))
    config = RTOConfig(**small_run(tiny, tmp_path / "run", prompt_key="prompt", **settings, resume="auto"))
    resumed = build.build(config)
    resumed.logger.close()
    assert resumed.average.weights.keys() == (saved.keys() if holds else set())
    assert all(torch.equal(t, saved[n]) for n, t in resumed.average.weights.items())


def test_warm_up_trains_the_critic_alone(tiny, tmp_path):
    run_rto(tiny, tmp_path / "run", iterations=2, critic_warmup=2, policy_lr=1e-2, critic_lr=1e-2)
    policy, start = (load_file(f"{f}/model.safetensors") for f in (tmp_path / "run" / "policy", tiny.policy))
    critic, reward = (load_file(f"{f}/model.safetensors") for f in (tmp_path / "run" / "critic", tiny.reward))
    assert all((policy[n] == start[n]).all() for n in policy)
    assert any((critic[n] != reward[n]).any() for n in critic)
    assert all("policy/loss" not in row for row in figures(tmp_path / "run"))


def test_less_than_a_rollout_of_prompts_is_one_iteration(tiny, tmp_path):
    assert run_rto(tiny, tmp_path / "run", iterations=0, epochs=0.001, report=False, sync_proof=False).iterations == 1


def test_the_policys_schedule_starts_after_the_warm_up(tiny, tmp_path):
    run_rto(tiny, tmp_path / "run", iterations=3, critic_warmup=1, policy_lr=1e-3, warmup_ratio=0.0, lr_floor=0.0)
    rows = figures(tmp_path / "run")
    # 2 updates an iteration, 2 iterations: the logged rate is that of each iteration's second update.
    assert [row.get("policy/lr") for row in rows] == [
        None, pytest.approx(1e-3 * 0.5 * (1 + 2**-0.5)), pytest.approx(1e-3 * 0.5 * (1 - 2**-0.5)),
    ]  # fmt: skip


def test_ppo_epochs_go_over_the_rollout_again_in_another_order(tiny, tmp_path, monkeypatch):
    from rto_fast.run import Run

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


def test_the_order_of_prompts_is_each_runs_own(tiny, tmp_path):
    """Two runs in one process on different numbers of prompts: the order of one is not lent to the other."""
    first = run_rto(tiny, tmp_path / "first", iterations=1)
    before = first.requests(0)
    second = run_rto(tiny, tmp_path / "second", iterations=1, max_rows=24)
    first.requests(0)
    drawn = [r.row for i in range(3) for r in second.requests(i)]
    assert sorted(drawn) == list(range(24)), "an epoch draws every prompt once"
    assert first.requests(0) == before


def test_the_longest_are_dropped_and_the_data_go_on_where_they_would(tiny, tmp_path, monkeypatch):
    """Half as many prompts again are drawn; pairs stay whole; a run that was stopped draws what it would have drawn."""
    from rto_fast.run import Run

    settings = {"rollout_oversample": 0.5, "rollout_batch": 4, "responses_per_prompt": 2, "policy_update": "rebel",
                "iterations": 3, "policy_lr": 1e-3, "save_every": 1, "resume": "auto"}  # fmt: skip
    seen = []
    monkeypatch.setattr(Run, "keep_samples", lambda run, iteration, rollout, *_: seen.append(rollout))
    run_rto(tiny, tmp_path / "run", **settings)
    for iteration, rollout in enumerate(seen):
        index = rollout.sample_index.tolist()
        assert index == sorted(index)
        assert all(index.count(i) == 2 and i in range(6 * iteration, 6 * iteration + 6) for i in index)
        assert len(index) == 8
    rows = figures(tmp_path / "run")
    assert [(row["rollout/dropped"], row["rollout/dropped_share"]) for row in rows] == [(4, pytest.approx(1 / 3))] * 3

    class Stopped(Exception):
        pass

    def stop(run):
        save(run)
        raise Stopped

    save, first = Run.save, list(seen)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", stop)
        with pytest.raises(Stopped):
            run_rto(tiny, tmp_path / "again", **settings)
    run_rto(tiny, tmp_path / "again", **settings)
    assert len(seen) == 6
    for a, b in zip(first, seen[3:], strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.sample_index, b.sample_index)
    weights = [load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("run", "again")]
    assert all((weights[0][n] == weights[1][n]).all() for n in weights[0])


def test_over_sampling_is_said_to_be_a_bias(tiny, tmp_path, capsys):
    run_rto(tiny, tmp_path / "run", rollout_oversample=0.1, iterations=1)
    printed = " ".join(capsys.readouterr().out.split())
    assert "warning: rollout_oversample: 9 prompts are drawn for every 8" in printed
    assert "biased towards short responses" in printed


@pytest.mark.slow
def test_two_ranks_drop_by_quotas(tiny, tmp_path, launch):
    settings = small_run(tiny, tmp_path / "run", rollout_oversample=0.5, responses_per_prompt=2, train_batch=4,
                         rollout_engine="transformers", report_samples=0)  # fmt: skip
    result = launch([ROOT / "tests" / "vllm_worker.py", json.dumps([settings])], ranks=2)
    assert result.returncode == 0, result.output
    assert [(row["rollout/dropped"], row["samples"]) for row in figures(tmp_path / "run")] == [(8, 16), (8, 32)]


BROKEN = """
calls = -1  # the trial before the run
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
    from rto_fast.backend.checkpoints import checkpoint_steps
    from rto_fast.errors import Diverged

    with pytest.raises(Diverged, match=r"2 bad steps in a row.*rollout 3 gave 8 non-finite score"):
        run_rto(
            tiny, tmp_path / "run", iterations=5, reward_model=(), reward_fn=broken_reward(2, 3), max_bad_steps=2,
            save_every=1,
        )  # fmt: skip
    assert checkpoint_steps(tmp_path / "run" / "checkpoints")[-1] == 2


def with_infinite_loss(honest):
    """A policy loss whose value and gradient are not finite: an advantage is infinite."""

    def broken(*args, terms, **rest):
        return honest(*args, terms=terms._replace(advantages=terms.advantages + float("inf")), **rest)

    return broken


def with_nan_gradient(honest):
    """A policy loss with its own finite value and a gradient of NaN."""

    def broken(hidden, *args, **rest):
        out = honest(hidden, *args, **rest)
        return out._replace(policy_loss=out.policy_loss + (0 * hidden.sum()).sqrt())

    return broken


@pytest.mark.parametrize("break_loss", [with_infinite_loss, with_nan_gradient])
@pytest.mark.parametrize(
    ("stage", "dtype", "max_grad_norm"), [(0, "fp32", 1.0), (2, "fp32", 0.0), (3, "fp32", 0.0), (2, "bf16", 1.0)]
)
def test_a_gradient_that_is_not_finite_moves_nothing(
    tiny, tmp_path, stage, dtype, max_grad_norm, break_loss, monkeypatch
):
    """The policy stays as it was, whatever checks its gradients; the critic's updates are untouched."""
    from rto_fast.algo import losses

    monkeypatch.setattr(losses, "policy_loss", break_loss(losses.policy_loss))
    run_rto(
        tiny, tmp_path / "run", iterations=1, zero_stage=stage, dtype=dtype, max_grad_norm=max_grad_norm,
        policy_lr=1e-2, critic_lr=1e-2, max_bad_steps=0,
    )  # fmt: skip
    policy, start = (load_file(f"{f}/model.safetensors") for f in (tmp_path / "run" / "policy", tiny.policy))
    assert all(torch.equal(policy[n], start[n].to(policy[n].dtype)) for n in policy)
    critic, reward = (load_file(f"{f}/model.safetensors") for f in (tmp_path / "run" / "critic", tiny.reward))
    assert any((critic[n] != reward[n].to(critic[n].dtype)).any() for n in critic)
    assert all(torch.isfinite(t).all() for t in critic.values())
    assert figures(tmp_path / "run")[0]["bad_steps"] == 1


def test_bad_gradients_in_a_row_stop_the_run_and_the_checkpoint_goes_on(tiny, tmp_path, monkeypatch):
    """Iterations 2 and 3 are bad; the checkpoint of 2 has the weights and the count, and honest iterations end it."""
    from rto_fast import trainer
    from rto_fast.algo import losses
    from rto_fast.errors import Diverged

    settings = {"iterations": 4, "max_bad_steps": 2, "save_every": 1, "policy_lr": 1e-3}
    honest, turn = trainer.updates, losses.policy_loss

    def updates(run, iteration, *rest):
        monkeypatch.setattr(losses, "policy_loss", with_nan_gradient(turn) if iteration else turn)
        return honest(run, iteration, *rest)

    monkeypatch.setattr(trainer, "updates", updates)
    with pytest.raises(Diverged, match=r"2 bad steps in a row.*iteration 3.*non-finite gradients"):
        run_rto(tiny, tmp_path / "run", **settings)
    monkeypatch.undo()
    run_rto(tiny, tmp_path / "run", **settings, resume="auto")
    rows = figures(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["bad_steps"] for row in rows] == [0, 1, 1, 1]
    policy, start = (load_file(f"{f}/model.safetensors") for f in (tmp_path / "run" / "policy", tiny.policy))
    assert any((policy[n] != start[n]).any() for n in policy)


def run_rm(tiny, folder, **settings):
    from rto_fast.config import RMConfig
    from rto_fast.supervised.reward_model import train_rm

    return train_rm(
        RMConfig(
            model=tiny.policy, data=tiny.pairs, output_dir=str(folder), dtype="fp32", batch=16, max_length=64, lr=1e-2,
            eval_fraction=0.0, data_cache=False, data_workers=1, gradient_checkpointing=False, **settings,
        )
    )  # fmt: skip


def nan_in(honest, calls):
    """A loss that is NaN in those calls (from 1)."""
    made = 0

    def broken(*args, **kwargs):
        nonlocal made
        made += 1
        return honest(*args, **kwargs) * (float("nan") if made in calls else 1.0)

    return broken


def test_supervised_steps_that_are_not_finite_are_skipped_and_counted(tiny, tmp_path, monkeypatch):
    from rto_fast.algo import preference

    monkeypatch.setattr(preference, "bradley_terry_loss", nan_in(preference.bradley_terry_loss, {2}))
    folder = run_rm(tiny, tmp_path / "run")
    rows = figures(tmp_path / "run")
    assert len(rows) >= 3
    assert [row["bad_steps"] for row in rows[:3]] == [0, 1, 1]
    assert [row["train/loss"] is None for row in rows[:3]] == [False, True, False]
    assert all(torch.isfinite(t).all() for t in load_file(folder / "model.safetensors").values())


def test_supervised_steps_bad_in_a_row_stop_the_run(tiny, tmp_path, monkeypatch):
    from rto_fast.algo import preference
    from rto_fast.backend.checkpoints import checkpoint_steps
    from rto_fast.errors import Diverged

    monkeypatch.setattr(preference, "bradley_terry_loss", nan_in(preference.bradley_terry_loss, {2, 3}))
    with pytest.raises(Diverged, match="2 non-finite steps in a row at step 3"):
        run_rm(tiny, tmp_path / "run", max_bad_steps=2, save_every=1)
    assert checkpoint_steps(tmp_path / "run" / "checkpoints")[-1] == 2
    assert not (tmp_path / "run" / "model").exists()
