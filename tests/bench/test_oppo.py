"""Optimistic PPO on token MDPs: its Q tables against exact ones, its regret against a closed form and the rate."""

from __future__ import annotations

import math

import pytest
import torch

from bench.theory import oppo
from bench.theory.token_mdp import TokenMDP

MDP = TokenMDP(actions=3, horizon=3)


def policy_of(runs: int, seed: int):
    return [t.softmax(-1) for t in oppo.random_rewards(MDP, runs, seed)]


def exact_q(policy, rewards):
    """[runs, A^h, A] for each h, by summing over every response."""
    every = MDP.sequences
    out = []
    for h in range(MDP.horizon):
        table = torch.zeros_like(rewards[h])
        for row in every.tolist():
            start, index = 0, []
            for token in row:
                index.append((start, token))
                start = start * MDP.actions + token
            chance, gain = 1.0, rewards[h][:, index[h][0], index[h][1]]
            for j in range(h + 1, MDP.horizon):
                chance = chance * policy[j][:, index[j][0], index[j][1]]
                gain = gain + rewards[j][:, index[j][0], index[j][1]]
            table[:, index[h][0], index[h][1]] += chance * gain
        out.append(table)
    return out


def test_with_everything_seen_the_q_tables_are_exact():
    policy, rewards = policy_of(4, 1), oppo.random_rewards(MDP, 4, 2)
    seen = [torch.full_like(r, 1e12) for r in rewards]
    found, truth = oppo.evaluate(policy, rewards, seen, bonus=0.0, ridge=1.0), exact_q(policy, rewards)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    start = (policy[0][:, 0] * truth[0][:, 0]).sum(-1)
    torch.testing.assert_close(oppo.values(policy, rewards), start)
    greedy = [torch.nn.functional.one_hot(t.argmax(-1), 3).double() for t in best_tables(rewards)]
    torch.testing.assert_close(oppo.values(greedy, rewards), oppo.best_values(rewards))


def best_tables(rewards):
    """Q* by value iteration from the last token."""
    q = [rewards[-1]]
    for r in reversed(rewards[:-1]):
        q.insert(0, r + q[0].amax(-1).view(r.shape))
    return q


def test_a_bonus_of_the_horizon_is_optimistic_everywhere():
    policy, rewards = policy_of(6, 3), oppo.random_rewards(MDP, 6, 4)
    generator = torch.Generator().manual_seed(5)
    counts = [torch.randint(0, 30, r.shape, generator=generator).double() for r in rewards]
    truth = exact_q(policy, rewards)
    optimistic = oppo.evaluate(policy, rewards, counts, bonus=3.0, ridge=1.0)
    assert all((a >= b - 1e-12).all() for a, b in zip(optimistic, truth, strict=True))
    plain = oppo.evaluate(policy, rewards, counts, bonus=0.0, ridge=1.0)
    assert all((a <= b + 1e-12).all() for a, b in zip(plain, truth, strict=True))
    assert any((a < b - 0.01).any() for a, b in zip(plain, truth, strict=True))


def test_the_first_two_policies():
    """The first is uniform; of one token, where nothing is unknown, the second is softmax(alpha * r)."""
    rewards = oppo.random_rewards(MDP, 3, 6)
    uniform = [torch.full_like(r, 1 / 3) for r in rewards]
    one = oppo.regret(MDP, rewards, [1, 1, 1], bonus=3.0)
    torch.testing.assert_close(one, oppo.best_values(rewards) - oppo.values(uniform, rewards))
    single = TokenMDP(actions=3, horizon=1)
    r = oppo.random_rewards(single, 1, 7)
    alpha = math.sqrt(2 * math.log(3) / 2)
    second = [(alpha * r[0]).softmax(-1)]
    expected = 2 * oppo.best_values(r) - r[0].mean() - oppo.values(second, r)
    torch.testing.assert_close(oppo.regret(single, r, [2], bonus=1.0), expected)


def test_regret_of_one_token_keeps_mirror_ascents_bound():
    """sqrt(2 K log A), the bound of exponential weights on gains in [0, 1]."""
    single = TokenMDP(actions=4, horizon=1)
    episodes = [10, 100, 1000]
    found = oppo.regret(single, oppo.random_rewards(single, 3, 8), episodes, bonus=1.0)
    assert all(g <= math.sqrt(2 * k * math.log(4)) for g, k in zip(found.tolist(), episodes, strict=True))


def test_regret_grows_like_the_root():
    small, runs = TokenMDP(actions=2, horizon=2), 6
    rewards = [t.repeat(2, 1, 1) for t in oppo.random_rewards(small, runs, 9)]
    found = oppo.regret(small, rewards, [300] * runs + [1200] * runs, bonus=2.0).view(2, runs).mean(1)
    assert math.log(found[1] / found[0]) / math.log(4) == pytest.approx(0.5, abs=0.12)
