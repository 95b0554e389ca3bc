"""The paper's claims on token MDPs small enough to enumerate; every tolerance is stated where it is used."""

from __future__ import annotations

import math

import pytest
import torch

from bench.theory import token_mdp
from bench.theory.token_mdp import Coefficients, TokenMDP

EXACT = 1e-9
"""Nats of log-prob of a response, after 200 natural-gradient steps that halve the error each."""
PLAIN = 2e-3
"""Total variation after plain gradient ascent."""


@pytest.fixture(scope="module")
def task():
    """(MDP, reference, DPO model, score of each response): random, none a function of another."""
    mdp = TokenMDP(actions=3, horizon=4)
    ref, dpo = (mdp.policy(mdp.random_tables(seed)) for seed in (0, 1))
    return mdp, ref, dpo, torch.randn(81, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def sequence_logp(mdp, tables):
    return mdp.along(tables).sum(1)


COEFFICIENTS = Coefficients(beta1=0.3, beta2=0.5, beta3=0.8)


def rto_optimum(task, c=COEFFICIENTS):
    """pi_ref * (pi_dpo / pi_ref)^(beta1 / beta2) * exp(beta3 * r / beta2), normalised."""
    mdp, ref, dpo, score = task
    ref, dpo = sequence_logp(mdp, ref), sequence_logp(mdp, dpo)
    return (ref + c.beta1 / c.beta2 * (dpo - ref) + c.beta3 / c.beta2 * score).log_softmax(0)


@pytest.mark.parametrize("credit", ["token", "sentence", "response"])
def test_rto_semi_rto_and_ddpo_reach_the_same_closed_form(task, credit):
    mdp, ref, dpo, score = task
    found = sequence_logp(mdp, token_mdp.optimise(mdp, ref, dpo, score, COEFFICIENTS, credit))
    assert (found - rto_optimum(task)).abs().max() < EXACT
    assert (found - sequence_logp(mdp, ref)).abs().max() > 0.5  # it had somewhere to go


def test_rs_ppo_reaches_ppos_optimum(task):
    mdp, ref, dpo, score = task
    ppo = Coefficients(beta1=0.0, beta2=0.5, beta3=0.8)
    plain = sequence_logp(mdp, token_mdp.optimise(mdp, ref, dpo, score, ppo, "token"))
    shaped = sequence_logp(mdp, token_mdp.optimise(mdp, ref, dpo, score, COEFFICIENTS, "shaped"))
    assert (plain - token_mdp.optimum(sequence_logp(mdp, ref), 0.8 * score, 0.5)).abs().max() < EXACT
    assert (shaped - plain).abs().max() < EXACT
    assert (plain - rto_optimum(task)).abs().max() > 0.1  # and it is another one than RTO's


def test_the_clip_changes_the_optimum_to_that_of_the_clipped_rewards(task):
    mdp, ref, dpo, score = task
    c = Coefficients(beta1=0.3, beta2=0.5, beta3=0.8, clip=0.1)
    found = sequence_logp(mdp, token_mdp.optimise(mdp, ref, dpo, score, c, "token"))
    dense = (0.3 * (mdp.along(dpo) - mdp.along(ref))).clamp(-0.1, 0.1).sum(1)
    assert (found - token_mdp.optimum(sequence_logp(mdp, ref), dense + 0.8 * score, 0.5)).abs().max() < EXACT
    assert (found - rto_optimum(task)).abs().max() > 0.1


def test_plain_policy_gradient_reaches_it_too(task):
    """Gradient ascent on log-probs weighted by constant returns-to-go, as in the trainer."""
    mdp, ref, dpo, score = task
    logits = [t.clone().requires_grad_() for t in ref]
    optimiser = torch.optim.Adam(logits, lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 400)
    for _ in range(400):
        policy = mdp.policy(logits)
        old = [t.detach() for t in policy]
        rewards = token_mdp.token_rewards(mdp, old, ref, dpo, score, COEFFICIENTS, "token")
        to_go = rewards.flip(1).cumsum(1).flip(1)
        weight = sequence_logp(mdp, old).exp()
        optimiser.zero_grad()
        (-(weight[:, None] * to_go * mdp.along(policy)).sum()).backward()
        optimiser.step()
        schedule.step()
    found = sequence_logp(mdp, mdp.policy(logits)).exp()
    assert 0.5 * (found - rto_optimum(task).exp()).abs().sum() < PLAIN


def test_token_rewards_of_the_optimum_sum_to_its_log_ratio(task):
    """beta * log(pi* / pi_ref) = r + V*(s') - V*(s) token by token, so their sum is the reward less V*(start)."""
    mdp, ref, _, _ = task
    reward, beta = mdp.random_tables(5, scale=0.7), 0.4
    values = token_mdp.soft_values(mdp, ref, reward, beta)
    best = mdp.conditionals(token_mdp.optimum(sequence_logp(mdp, ref), mdp.along(reward).sum(1), beta))
    for ours, base, shaped in zip(best, ref, token_mdp.shaped_reward(mdp, ref, reward, beta), strict=True):
        assert (beta * (ours - base) - shaped).abs().max() < EXACT
    total = mdp.along(token_mdp.shaped_reward(mdp, ref, reward, beta)).sum(1)
    assert (total - mdp.along(reward).sum(1) + values[0][0]).abs().max() < EXACT


def test_dpo_recovers_the_token_reward_as_preferences_grow():
    """Error of beta * log(pi_dpo / pi_ref) against r + V*(s') - V*(s): slope -1/2 in the pairs, within 0.1."""
    mdp, beta = TokenMDP(actions=3, horizon=2), 0.5
    ref = mdp.policy(mdp.random_tables(0, scale=0.5))
    reward = mdp.random_tables(1, scale=0.7)
    truth = token_mdp.shaped_reward(mdp, ref, reward, beta)
    sizes, errors = (1000, 4000, 16000, 64000), []
    for pairs in sizes:
        squares = []
        for seed in range(12):
            counts = token_mdp.sample_preferences(mdp, ref, reward, pairs, seed)
            dpo = token_mdp.fit_dpo(mdp, ref, counts, beta)
            found = [beta * (d - r) for d, r in zip(dpo, ref, strict=True)]
            squares.append(token_mdp.reward_error(mdp, ref, found, truth) ** 2)
        errors.append(math.sqrt(sum(squares) / len(squares)))
    x, y = ([math.log(v) for v in column] for column in (sizes, errors))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)
    assert slope == pytest.approx(-0.5, abs=0.1)
    assert errors[-1] < 0.05


@pytest.mark.parametrize("delay", [0, 1, 2, 5])
def test_token_feedback_needs_fewer_queries(delay):
    """A plain search stays below H * A^(delay + 1); without token rewards (A^H + 1) / 2 are expected, within 10 %."""
    actions, horizon = 3, 6
    token, sentence = token_mdp.mean_queries(actions, horizon, delay, trials=2000, seed=0)
    worst = token_mdp.tokenwise_queries([actions - 1] * horizon, actions, delay)
    assert token <= worst <= horizon * actions ** (delay + 1)
    assert sentence == pytest.approx((actions**horizon + 1) / 2, rel=0.1)
    if delay + 1 < horizon:
        assert token < sentence / 3
    else:
        assert token > sentence  # credit that comes at the end only is sentence-level feedback, asked node by node


def test_token_queries_grow_linearly_and_sentence_queries_exponentially_with_the_horizon():
    found = [token_mdp.mean_queries(3, h, 1, trials=1000, seed=1) for h in (2, 4, 8)]
    token, sentence = zip(*found, strict=True)
    assert [t / token[0] for t in token] == pytest.approx([1, 2, 4], rel=0.1)
    assert sentence[2] / sentence[1] == pytest.approx(3**4, rel=0.15)


def test_looking_at_the_state_is_worth_a_half():
    """Prop. C.2: two states follow the first step with 1/2 each, and each rewards another action."""
    transition = torch.zeros(1, 3, 2, 3, dtype=torch.float64)
    transition[0, 0, :, 1] = transition[0, 0, :, 2] = 0.5
    reward = torch.zeros(2, 3, 2, dtype=torch.float64)
    reward[1, 1, 0] = reward[1, 2, 1] = 1.0
    assert token_mdp.best_policy_value(transition, reward) == 1.0
    assert token_mdp.best_sequence_value(transition, reward) == 0.5
