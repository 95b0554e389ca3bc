"""Guided sampling: the exact distribution of an enumerable model, and what its special cases must equal."""

from __future__ import annotations

import itertools

import pytest
import torch
from rollout_helpers import assert_same, engine_of, model_path, quiet, requests_of
from transformers import AutoModelForCausalLM

from rto_fast.contract import Request
from rto_fast.rollout.beams import beam_search
from rto_fast.rollout.engine import Sampling, sample_seed
from rto_fast.rollout.guided import GuidedEngine

FAMILIES = ("llama", "gpt2", "qwen3")
LOADING = ("cpu", torch.float32, 0)


def guided(vocab: int, scale: float, model="llama", guide="gpt2", reference="qwen3") -> GuidedEngine:
    """Three models of other architectures: each must step through a cache of its own."""
    path, other = (str(model_path(m, vocab)) for m in (model, guide))
    return GuidedEngine(
        path, *LOADING, guide=other, reference=str(model_path(reference, vocab)) if reference else "", scale=scale
    )


def tables(paths, prompt, responses, scale: float, temperature: float) -> torch.Tensor:
    """[S, H] fp64 log-probs of each token of the responses [S, H], every model's by a forward without cache."""
    whole = torch.cat([torch.tensor([prompt]).expand(len(responses), -1), responses], 1)
    base, guide, ref = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64)(whole).logits.detach().log_softmax(-1)
        for p in paths
    )
    logp = ((base + scale * (guide - ref)) / temperature).log_softmax(-1)[:, len(prompt) - 1 : -1]
    return logp.gather(2, responses[..., None])[..., 0]


@pytest.mark.parametrize(("scale", "temperature"), [(2.5, 1.0), (-0.5, 0.7)])
def test_the_distribution_is_the_exact_one(scale, temperature):
    vocab, horizon, prompt, count = 5, 3, (3, 1, 4, 1), 4000
    responses = torch.tensor(list(itertools.product(range(vocab), repeat=horizon)))
    paths = [model_path(f, vocab) for f in FAMILIES]
    truth = tables(paths, prompt, responses, scale, temperature)
    assert float(truth.sum(1).exp().sum()) == pytest.approx(1, abs=1e-9)
    requests = [Request(prompt, 0, 0, j, sample_seed(0, 0, 0, j)) for j in range(count)]
    found = guided(vocab, scale).generate(requests, Sampling(horizon, temperature, ()), quiet)
    index = (torch.stack(found.responses()) * vocab ** torch.arange(horizon - 1, -1, -1)).sum(1)
    torch.testing.assert_close(found.sampler_logp.view(count, horizon).double(), truth[index], atol=1e-4, rtol=0)
    share, exact = torch.bincount(index, minlength=len(responses)) / count, truth.sum(1).exp()
    assert ((share - exact).abs() < 4.5 * (exact * (1 - exact) / count).sqrt() + 1 / count).all()


def test_rows_that_end_leave_the_guides_in_step():
    """Prompts and responses of many lengths: the batch is compacted; each alone gives the same."""
    requests, sampling = requests_of(24, 40, seed=4), Sampling(30, 1.0, tuple(range(0, 40, 7)))
    engine = guided(40, 0.8)
    whole = engine.generate(requests, sampling, quiet)
    assert 1 < whole.response_lens.min() + 1 < whole.response_lens.max()
    engine.rollout_tokens = 1
    assert_same(engine.generate(requests, sampling, quiet), whole)


def test_no_reference_means_the_model_itself():
    """Scale 1 then samples from the guide, scale 0 from the model."""
    requests, sampling = requests_of(12, 40, seed=5), Sampling(12, 1.0, (2,))
    for scale, path in ((1.0, "gpt2"), (0.0, "llama")):
        found = guided(40, scale, reference="").generate(requests, sampling, quiet)
        assert_same(found, engine_of(model_path(path)).generate(requests, sampling, quiet))
    named, unnamed = (guided(40, 0.7, reference=name) for name in ("llama", ""))
    assert (len(named.guides), len(unnamed.guides)) == (2, 1)
    assert_same(named.generate(requests, sampling, quiet), unnamed.generate(requests, sampling, quiet))


def test_a_full_beam_ranks_the_guided_distribution():
    vocab, prompt = 5, (3, 1)
    responses = torch.tensor(list(itertools.product(range(vocab), repeat=3)))
    truth = tables([model_path(f, vocab) for f in FAMILIES], prompt, responses, 1.7, 1.0).sum(1)
    requests = [Request(prompt, 0, 0, j, 0) for j in range(20)]
    found = beam_search(guided(vocab, 1.7), requests, Sampling(3, 1.0, ()), 125, 0.0)
    assert torch.equal(torch.stack(found.responses()), responses[truth.argsort(descending=True)[:20]])
