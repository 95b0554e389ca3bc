"""Random numbers of a request, and the draw of a token: the right distribution and no impossible token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from rollout_helpers import engine_of, model_path, quiet
from transformers import AutoModelForCausalLM

from rto_fast.contract import Request
from rto_fast.rollout.decoding import sample, uniforms
from rto_fast.rollout.engine import Sampling, sample_seed


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """P(chi-square >= observed); cells of under 5 expected are pooled."""
    counts, expected = counts.double().flatten(), expected.double().flatten()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


def test_sample_seed_is_stable_and_distinct():
    assert sample_seed(0, 0, 0, 0) == 5854343820274218872
    seeds = {sample_seed(*key) for key in itertools.product(range(3), range(20), range(3), range(4))}
    assert len(seeds) == 3 * 20 * 3 * 4
    assert all(0 <= s < 2**63 for s in seeds)


def test_uniforms_depend_on_their_seed_alone():
    seeds = [sample_seed(1, i, 0, 0) for i in range(50)]
    u = uniforms(seeds, 64)
    assert u.shape == (64, 50)
    assert u.dtype == np.float64
    np.testing.assert_array_equal(uniforms(seeds[7:8], 64)[:, 0], u[:, 7])
    np.testing.assert_array_equal(uniforms(seeds, 10), u[:10])
    assert (uniforms([5], 8) != uniforms([5 + 2**32], 8)).all()  # all 64 bits of the seed count


def test_uniforms_are_uniform():
    u = torch.from_numpy(uniforms([sample_seed(2, i, 0, 0) for i in range(2000)], 50))
    assert 0 <= u.min() <= u.max() <= 1 - 2.0**-52
    assert chi_square_p(torch.histc(u, 100, 0, 1), torch.full((100,), 1000.0)) > 1e-3
    pairs = (u[:-1] * 10).long() * 10 + (u[1:] * 10).long()  # successive numbers are independent
    assert chi_square_p(torch.bincount(pairs.flatten(), minlength=100), torch.full((100,), 980.0)) > 1e-3
    across = (u[:, :-1] * 10).long() * 10 + (u[:, 1:] * 10).long()
    assert chi_square_p(torch.bincount(across.flatten(), minlength=100), torch.full((100,), 999.5)) > 1e-3


@pytest.mark.parametrize("vocab", [1, 2, 1000, 50_000])
def test_sample_at_the_ends_takes_no_impossible_token(vocab):
    torch.manual_seed(vocab)
    logits = torch.randn(64, vocab) * 3
    dead = torch.rand(64, vocab) < 0.5
    dead[:, [0, -1]] = vocab > 1
    dead[:, vocab // 2] = False
    logits[dead] = -torch.inf
    for u in (0.0, 2.0**-53, 0.5, 1 - 2.0**-52):
        token, logp = sample(logits, torch.full((64,), u, dtype=torch.float64), 1.0)
        assert token.max() < vocab
        assert torch.isfinite(logp).all()
        assert not dead.gather(1, token).any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sample_logp_is_log_softmax_at_the_temperature(temperature):
    torch.manual_seed(0)
    logits = torch.randn(50, 300, dtype=torch.bfloat16)
    token, logp = sample(logits, torch.rand(50, dtype=torch.float64), temperature)
    truth = torch.log_softmax(logits.double() / temperature, -1).gather(1, token)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), truth, atol=2e-6, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_distribution_of_two_tokens(temperature):
    """20,000 responses of two tokens: every (first, second) pair as often as the model's softmax says."""
    vocab, count = 8, 20_000
    path = model_path("llama", vocab)
    prompt = (1, 5, 3)
    requests = [Request(prompt, 0, i, 0, sample_seed(3, i, 0, 0)) for i in range(count)]
    rollout = engine_of(path).generate(requests, Sampling(2, temperature, ()), quiet)
    first, second = rollout.response_tokens.view(count, 2).T
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    inputs = torch.tensor([[*prompt, t] for t in range(vocab)])
    with torch.no_grad():
        probs = torch.softmax(model(inputs).logits / temperature, -1)
    p_first, p_second = probs[0, 2], probs[:, 3]
    assert p_first.max() / p_first.min() > 3  # a uniform sampler would not pass
    assert chi_square_p(torch.bincount(first, minlength=vocab), p_first * count) > 1e-3
    pairs = torch.bincount(first * vocab + second, minlength=vocab**2)
    assert chi_square_p(pairs, p_first[:, None] * p_second * count) > 1e-3
    wrong = torch.softmax(p_first.log() * 1.1, -1)  # the test has the power to see a slightly wrong temperature
    assert chi_square_p(torch.bincount(first, minlength=vocab), wrong * count) < 1e-3
