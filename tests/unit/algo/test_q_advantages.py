"""`--advantage q`: by its definition, and its gradient and fixed point over every response of a token MDP."""

from __future__ import annotations

import itertools

import pytest
import torch

from bench.theory.token_mdp import TokenMDP
from rto_fast.algo import advantages
from rto_fast.config import RTOConfig
from rto_fast.contract import Rollout, Scores, offsets
from rto_fast.errors import ConfigError
from rto_fast.trainer import compute_targets

MDP = TokenMDP(actions=3, horizon=3)


def config_of(**settings):
    base = {"policy": "p", "dpo_model": "d", "reward_model": ("r",), "data": "x", "responses_per_prompt": 2}
    return RTOConfig(**(base | {"advantage": "q", "rollout_batch": 2, "train_batch": 2} | settings))


def rollout_of(lens, tokens) -> Rollout:
    whole = [[0, *part.tolist()] for part in tokens.split(lens.tolist())]
    return Rollout(
        tokens=torch.tensor(list(itertools.chain.from_iterable(whole))), prompt_lens=torch.ones_like(lens),
        response_lens=lens, truncated=torch.zeros(len(lens), dtype=torch.bool), sampler_logp=torch.zeros(len(tokens)),
        rows=torch.zeros_like(lens), sample_index=torch.zeros_like(lens), version=0,
    )  # fmt: skip


def scores_of(policy, ref, dpo, score) -> Scores:
    nothing = torch.zeros_like(policy)
    return Scores(
        old_logp=policy, policy_logp=policy, ref_logp=ref, dpo_logp=dpo, dpo_ref_logp=ref, values=nothing,
        bootstrap=torch.zeros_like(score), score=score,
    )  # fmt: skip


def test_each_token_has_its_own_reward_and_the_score_less_the_others():
    """An empty response's score is paid to nobody: it counts 0, as its return does in rloo."""
    lens = torch.tensor([2, 3, 0, 1])
    draw = torch.Generator().manual_seed(0)
    logps = [torch.randn(6, generator=draw) * 0.3 for _ in range(3)]
    score = torch.tensor([1.5, -0.5, 9.0, 40.0])
    config = config_of(beta1=0.2, beta2=0.1, beta3=0.5, dpo_clip=0.03, score_clip=10.0)
    targets = compute_targets(rollout_of(lens, torch.ones(6, dtype=torch.int64)), scores_of(*logps, score), config, 0.1)
    policy, ref, dpo = logps
    own = (0.2 * (dpo - ref)).clamp(-0.03, 0.03) - 0.1 * (policy - ref)
    centred = torch.tensor([0.75 + 0.25, -0.25 - 0.75, 0.0, 5.0 - 0.0])
    torch.testing.assert_close(targets.advantages, own + torch.repeat_interleave(centred, lens))
    assert [float(x) for x in targets.whiten] == [0.0, 1.0]


def every_pair(policy, ref, dpo, score, config):
    """(chance [P], log-probs [2P, H] with gradient, advantages [2P, H]) of all pairs of responses, one rollout."""
    rows = MDP.along([t.detach() for t in policy]), MDP.along(ref), MDP.along(dpo)
    pairs = torch.cartesian_prod(*[torch.arange(27)] * 2).reshape(-1)
    lens = torch.full((len(pairs),), 3)
    flat = [t[pairs].reshape(-1).float() for t in rows]
    rollout = rollout_of(lens, MDP.sequences[pairs].reshape(-1))
    found = compute_targets(rollout, scores_of(*flat, score[pairs].float()), config, config.beta2)
    chance = rows[0].sum(1)[pairs].view(-1, 2).sum(1).exp()
    return chance, MDP.along(policy)[pairs], found.advantages.view(-1, 3).double()


def expected_gradient(logits, ref, dpo, score, config):
    """Of sum over tokens of log pi * advantage, per response, over all pairs of the policy's own."""
    chance, logp, found = every_pair(MDP.policy(logits), ref, dpo, score, config)
    total = (chance * (logp * found).sum(1).view(-1, 2).sum(1)).sum() / 2
    return torch.autograd.grad(total, logits)


def tables(seed, scale=1.0):
    return MDP.random_tables(seed, scale)


@pytest.mark.parametrize("beta3", [0.0, 0.7])
def test_the_gradient_is_the_scores_and_each_tokens_own_reward(beta3):
    ref, dpo = (MDP.policy(tables(s)) for s in (1, 2))
    score = torch.randn(27, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits = [t.requires_grad_() for t in tables(4)]
    config = config_of(beta1=0.3, beta2=0.2, beta3=beta3, dpo_clip=0.0, score_clip=0.0)
    found = expected_gradient(logits, ref, dpo, score, config)
    policy = MDP.policy(logits)
    own = [0.3 * (d - r) - 0.2 * (p - r).detach() for d, r, p in zip(dpo, ref, policy, strict=True)]
    logp = MDP.along(policy)
    chance = logp.sum(1)
    gain = beta3 * (chance.exp() * score).sum()  # the gradient of the mean score itself
    tokens = (chance.detach().exp() * (logp * MDP.along(own)).sum(1)).sum()
    truth = torch.autograd.grad(gain + tokens, logits)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert max(float(t.abs().max()) for t in truth) > 0.01


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_without_a_score_it_rests_where_guided_decoding_samples(weight):
    """pi ~ pi_ref * (pi_dpo / pi_ref)^(beta1 / beta2), token by token; at 1 the DPO model, RTO's optimum."""
    ref, dpo = (MDP.policy(tables(s)) for s in (5, 6))
    config = config_of(beta1=0.2 * weight, beta2=0.2, beta3=0.0, dpo_clip=0.0)
    score = torch.zeros(27, dtype=torch.float64)
    guided = [(r + weight * (d - r)).requires_grad_() for r, d in zip(ref, dpo, strict=True)]
    rest = expected_gradient(guided, ref, dpo, score, config)
    away = expected_gradient([t.clone().requires_grad_() for t in ref], ref, dpo, score, config)
    assert max(float(t.abs().max()) for t in rest) < 1e-6
    assert max(float(t.abs().max()) for t in away) > 0.01


@pytest.mark.parametrize("credit", ["sentence", "response", "shaped"])
def test_with_rewards_that_are_paid_elsewhere_it_would_not_rest_there(credit):
    """Why they are refused: nothing that is paid behind a token comes back to it."""
    ref, dpo = (MDP.policy(tables(s)) for s in (5, 6))
    config = config_of(beta1=0.2, beta2=0.2, beta3=0.0, dpo_clip=0.0, credit=credit)
    score = torch.zeros(27, dtype=torch.float64)
    moved = expected_gradient([t.clone().requires_grad_() for t in dpo], ref, dpo, score, config)
    assert max(float(t.abs().max()) for t in moved) > 0.01


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        *(
            ({"credit": c}, f"credit: q takes .* own reward for its advantage, and {c!r} pays it elsewhere; use token")
            for c in ("sentence", "segment", "response", "shaped")
        ),
        ({"responses_per_prompt": 1}, "responses_per_prompt: q needs at least 2"),
        ({"gamma": 0.9}, "gamma: q discounts nothing; leave it at 1, got 0.9"),
        ({"critic": "reward"}, "critic: 'reward' needs a critic, and q has none"),
    ],
)
def test_contradictory_settings_are_refused(settings, names):
    config_of().validate()
    with pytest.raises(ConfigError, match=names):
        config_of(**settings).validate()


def test_a_rollout_without_a_token():
    cu, none = offsets(torch.tensor([0, 0])), torch.zeros(0)
    estimate = advantages.q(none, scores_of(none, none, none, torch.ones(2)), cu, gamma=1.0, lam=1.0, group=2)
    assert estimate.advantages.numel() == 0
