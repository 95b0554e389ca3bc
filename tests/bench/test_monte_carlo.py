"""Monte-Carlo values: exact where the policy is certain, from the policy's own continuations where it is not."""

from __future__ import annotations

import itertools
from contextlib import closing

import pytest
import torch
from loop_helpers import small_run

from bench.claim import monte_carlo
from rto_fast import build, trainer
from rto_fast.config import RTOConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_rank")]


@pytest.fixture
def opened(tiny, tmp_path):
    """A run and its first rollout, both by a config's settings."""

    def make(**settings):
        run = build.build(RTOConfig(**small_run(tiny, tmp_path / "run", iterations=1, report=False, **settings)))
        stack.append(closing(run.sync))
        return run, trainer.draw(run, 0)

    stack: list = []
    yield make
    for one in stack:
        one.__exit__()


@pytest.mark.parametrize("settings", [{}, {"credit": "response"}, {"credit": "shaped", "gamma": 0.9}])
def test_a_policy_without_chance_has_its_returns_as_values(opened, settings):
    """Every continuation is the response itself, so that the values are the rewards still to come."""
    run, rollout = opened(temperature=1e-4, **settings)
    gamma, lens = run.config.gamma, rollout.response_lens.tolist()
    assert max(lens) > 3
    found = monte_carlo.values(run, rollout, samples=2)
    _, scores, _ = trainer.score(run, 0, rollout, None)
    paid = trainer.compute_targets(rollout, scores, run.config, run.state.kl.beta2, run.delimiters)
    for values, rewards in zip(found.split(lens), paid.rewards.split(lens), strict=True):
        to_go = torch.zeros(len(rewards) + 1, dtype=torch.float64)
        for t in reversed(range(len(rewards))):
            to_go[t] = rewards[t] + gamma * to_go[t + 1]
        torch.testing.assert_close(values.double(), to_go[:-1], rtol=1e-4, atol=1e-5)


def test_continuations_begin_as_the_response_and_go_on_anew(opened):
    run, rollout = opened()
    index = (rollout.response_lens > 4).nonzero().flatten().tolist()
    found = monte_carlo.continuations(run, rollout, [(i, 4) for i in index], samples=8)
    assert len(found) == 8 * len(index)
    responses, logps = rollout.responses(), rollout.sampler_logp.split(rollout.response_lens.tolist())
    ends = set()
    for j, (one, logp) in enumerate(zip(found.responses(), found.sampler_logp.split(found.response_lens.tolist()),
                                        strict=True)):  # fmt: skip
        i = index[j // 8]
        assert one[:4].tolist() == responses[i][:4].tolist()
        torch.testing.assert_close(logp[:4], logps[i][:4])
        assert 4 < len(one) <= run.config.max_response_length
        assert found.prompts()[j].tolist() == rollout.prompts()[i].tolist()
        ends.add((i, tuple(one[4:].tolist())))
    assert len(ends) > 4 * len(index), "nearly all go on differently"


def test_states_are_batched_where_positions_are_few(opened, monkeypatch):
    """Each state comes once, whatever room there is, and a continuation is as long as the limit lets it be."""
    run, rollout = opened()
    longest = int(rollout.prompt_lens.max()) + run.config.max_response_length
    states = [(i, t) for i, n in enumerate(rollout.response_lens.tolist()) for t in range(n)]
    for positions, count in ((longest + 2, 3), (10 * longest, max(rollout.response_lens.tolist()))):
        monkeypatch.setattr(run.policy.model.inner.config, "max_position_embeddings", positions)
        batches = list(monte_carlo.batches(run, rollout))
        assert sorted(itertools.chain(*batches)) == states
        assert max(len({t for _, t in batch}) for batch in batches) == count
    both = monte_carlo.continuations(run, rollout, [(0, 0), (0, 1)], samples=16)
    assert max(both.response_lens.tolist()) == run.config.max_response_length
    ended = torch.isin(torch.stack([r[-1] for r in both.responses()]), torch.tensor(run.sampling.stop_ids))
    assert torch.equal(both.truncated, ~ended)


def test_the_trainer_takes_them_for_the_critics(tiny, tmp_path, monkeypatch):
    """At values that are right and a policy without chance no token is better than expected: advantages are 0."""
    seen = []

    def watched(*args, **kwargs):
        seen.append(compute_targets(*args, **kwargs))
        return seen[-1]

    compute_targets = trainer.compute_targets
    monkeypatch.setattr(trainer, "compute_targets", watched)
    settings = {"temperature": 1e-4, "iterations": 1, "report": False, "score_clip": 0.0}
    trainer.train(RTOConfig(**small_run(tiny, tmp_path / "with", **settings)),
                  value=lambda run, rollout: monte_carlo.values(run, rollout, 1))  # fmt: skip
    trainer.train(RTOConfig(**small_run(tiny, tmp_path / "without", **settings)))
    certain, learnt = (float(t.advantages.abs().max()) for t in seen)
    assert certain < 1e-4 < learnt
