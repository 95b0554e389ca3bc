"""Beam search: a full beam is enumeration, a narrow one is transformers' own, batches change nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from rollout_helpers import engine_of, model_path, quiet, reference_logp, requests_of
from transformers import AutoModelForCausalLM, GenerationConfig

from rto_fast.contract import Request, Rollout
from rto_fast.errors import RolloutError
from rto_fast.rollout.beams import beam_search
from rto_fast.rollout.engine import GREEDY, Sampling

STOP = 2


def each(prompt, count: int) -> list[Request]:
    return [Request(tuple(prompt), row=0, sample_index=0, response_index=j, seed=0) for j in range(count)]


def enumerated(path, prompt, vocab: int, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Every response and its log-prob, from one float64 forward of each."""
    tokens = range(vocab)
    longest = sampling.max_tokens
    whole = [
        r for n in range(1, longest + 1) for r in itertools.product(tokens, repeat=n)
        if STOP not in r[:-1] and (r[-1] == STOP or n == longest) and (r[-1] != STOP or n > sampling.min_tokens)
    ]  # fmt: skip
    nothing = [[0.0] * len(r) for r in whole]
    rollout = Rollout.from_lists(each(prompt, len(whole)), whole, nothing, [False] * len(whole), 0)
    logp = reference_logp(path, rollout, 1.0, (STOP,), sampling.min_tokens)
    sums = [float(part.sum()) for part in logp.split(rollout.response_lens.tolist())]
    return dict(zip(whole, sums, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral_window", "lfm2_hybrid"])
@pytest.mark.parametrize(("power", "least"), [(0.0, 0), (1.0, 0), (0.5, 1)])
def test_a_full_beam_is_enumeration(family, power, least):
    path, prompt = model_path(family, 6), (3, 1, 4)
    sampling = Sampling(3, 1.0, (STOP,), least)
    truth = enumerated(path, prompt, 6, sampling)
    ranked = sorted(truth, key=lambda r: -truth[r] / len(r) ** power)
    found = beam_search(engine_of(path), each(prompt, len(ranked)), sampling, beams=6**3, length_penalty=power)
    assert [tuple(r.tolist()) for r in found.responses()] == ranked
    sums = [float(part.sum()) for part in found.sampler_logp.split(found.response_lens.tolist())]
    assert sums == pytest.approx([truth[r] for r in ranked], abs=1e-4)
    assert found.truncated.tolist() == [r[-1] != STOP for r in ranked]


def likeliest(model, prompt, beams: int, power: float, longest: int) -> list[list[int]]:
    """transformers' own beams, best first, without what pads them."""
    settings = GenerationConfig(
        num_beams=beams, num_return_sequences=beams, length_penalty=power, max_new_tokens=longest, eos_token_id=STOP,
        pad_token_id=0, early_stopping="never", do_sample=False,
    )  # fmt: skip
    ids = torch.tensor([prompt])
    rows = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    rows = rows[:, len(prompt) :].tolist()
    return [r[: r.index(STOP) + 1] if STOP in r else r for r in rows]


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_a_narrow_beam_is_that_of_transformers(power):
    """Prompts of several lengths in one batch against one prompt at a time."""
    path = model_path("llama")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompts = [q.prompt for q in requests_of(5, 40, seed=1)]
    sampling = Sampling(14, 1.0, (STOP,))
    asked = [Request(p, 0, i, j, 0) for i, p in enumerate(prompts) for j in range(3)]
    found = [r.tolist() for r in beam_search(engine_of(path), asked, sampling, 3, power).responses()]
    theirs = [r for p in prompts for r in likeliest(model, p, 3, power, 14)]
    assert found == theirs
    assert len({len(r) for r in theirs}) > 2


def test_one_beam_takes_the_likeliest_token_each_time():
    engine = engine_of(model_path("qwen3"))
    requests = requests_of(6, 40, seed=2)
    greedy = engine.generate(requests, Sampling(10, GREEDY, (STOP,)), quiet)
    found = beam_search(engine, requests, Sampling(10, 1.0, (STOP,)), 1, 0.0)
    assert torch.equal(found.tokens, greedy.tokens)


def test_more_beams_find_likelier_responses_and_batches_change_nothing():
    path, requests = model_path("llama"), requests_of(6, 40, seed=3)
    sampling = Sampling(8, 1.0, (STOP,))

    def total(beams, **kwargs):
        found = beam_search(engine_of(path, **kwargs), requests, sampling, beams, 0.0)
        return found, torch.tensor([float(p.sum()) for p in found.sampler_logp.split(found.response_lens.tolist())])

    (_, narrow), (wide, best) = total(1), total(16)
    assert (best >= narrow - 1e-4).all()
    assert best.sum() > narrow.sum() + 0.1
    single, _ = total(16, rollout_tokens=1)
    assert torch.equal(single.tokens, wide.tokens)


def test_the_jth_response_can_be_asked_for_alone():
    """A chunk may begin amid a prompt's responses."""
    engine, asked = engine_of(model_path("llama")), each((5, 6), 4)
    sampling = Sampling(6, 1.0, (STOP,))
    whole = beam_search(engine, asked, sampling, 4, 0.0)
    part = beam_search(engine, asked[2:], sampling, 4, 0.0)
    assert torch.equal(part.tokens, whole.select([2, 3]).tokens)


def test_more_responses_than_there_are():
    with pytest.raises(RolloutError, match="row 0: 6 responses of at most 1 token exist, and the 7th was asked for"):
        beam_search(engine_of(model_path("llama", 6)), each((3,), 7), Sampling(1, 1.0, (STOP,)), 8, 0.0)
