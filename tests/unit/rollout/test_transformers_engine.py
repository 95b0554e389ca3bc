"""The transformers engine's rollouts: the same in any batch, exact log-probs, stops, speed."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace

import pytest
import torch
from rollout_helpers import (
    FAMILIES,
    FAST,
    assert_same,
    engine_of,
    model_path,
    on_real_models,
    quiet,
    reference_logp,
    requests_of,
)
from transformers import AutoModelForCausalLM

from rto_fast.contract import Request
from rto_fast.rollout import transformers_engine
from rto_fast.rollout.engine import Sampling, sample_seed
from rto_fast.rollout.transformers_engine import TransformersEngine

# Log-probs, batches, stops


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mamba"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_equals_a_forward_of_each_sequence_alone(family, temperature):
    """Padding, cache and the dropping of ended rows leave no trace, on either way through the engine."""
    path = model_path(family)
    engine = engine_of(path)
    assert engine.fast == (family in FAST)
    rollout = engine.generate(requests_of(24, 40), Sampling(30, temperature, (2, 7)), quiet)
    assert len(set(rollout.response_lens.tolist())) > 2  # rows ended at several times
    truth = reference_logp(path, rollout, temperature)
    torch.testing.assert_close(rollout.sampler_logp.double(), truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_no_response_ends_before_its_least_length(family):
    """Stop ids come behind `min_tokens` tokens only; the log-probs before are those among the other tokens."""
    path, stops, least = model_path(family), (2, 7, 9), 5
    engine, requests = engine_of(path), requests_of(60, 40)
    free = engine.generate(requests, Sampling(30, 0.7, stops), quiet)
    assert int((free.response_lens <= least).sum()) > 5
    assert_same(free, engine.generate(requests, Sampling(30, 0.7, stops, 0), quiet))
    rollout = engine.generate(requests, Sampling(30, 0.7, stops, least), quiet)
    assert int(rollout.response_lens.min()) == least + 1
    for response, cut in zip(rollout.responses(), rollout.truncated.tolist(), strict=True):
        assert not set(response[:-1].tolist()) & set(stops)
        assert cut or int(response[-1]) in stops
    truth = reference_logp(path, rollout, 0.7, stops, least)
    torch.testing.assert_close(rollout.sampler_logp.double(), truth, atol=1e-5, rtol=0)
    assert (truth - reference_logp(path, rollout, 0.7)).abs().max() > 0.01
    for least in (-1, 30):
        with pytest.raises(ValueError, match=r"min_tokens: must lie in \[0, max_tokens 30\)"):
            Sampling(30, 1.0, stops, least)


@on_real_models
def test_logp_on_real_models(path):
    engine, starts = engine_of(path), [Request((1,), i, i, 0, sample_seed(4, i, 0, 0)) for i in range(16)]
    texts = engine.generate(starts, Sampling(20, 1.0, (2,)), quiet).sequences()
    prompts = [tuple(text[: 1 + i].tolist()) for i, text in enumerate(texts)]  # of 1 to 16 tokens
    requests = [Request(p, i, i, 0, sample_seed(5, i, 0, 0)) for i, p in enumerate(prompts)]
    rollout = engine.generate(requests, Sampling(80, 1.0, (2, 426)), quiet)
    truth = reference_logp(path, rollout, 1.0)
    # fp32 rounding: up to 1.08e-5 on one kind of processor
    torch.testing.assert_close(rollout.sampler_logp.double(), truth, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_batch_and_order_change_nothing(family):
    path, sampling = model_path(family), Sampling(24, 0.9, (2, 11))
    requests = requests_of(40, 40)
    whole = engine_of(path).generate(requests, sampling, quiet)
    assert whole.rows.tolist() == [q.row for q in requests]
    assert whole.prompts()[3].tolist() == list(requests[3].prompt)
    small = engine_of(path, rollout_tokens=150)
    assert len(list(small.batches([len(q.prompt) for q in requests], 24))) > 5
    assert_same(whole, small.generate(requests, sampling, quiet))
    turned = engine_of(path).generate(requests[::-1], sampling, quiet)
    assert_same(whole, turned.select(range(39, -1, -1)))
    for i in (0, 17):
        assert_same(whole.select([i]), small.generate([requests[i]], sampling, quiet))


@on_real_models
def test_batch_changes_nothing_on_real_models(path):
    requests, sampling = requests_of(24, 512), Sampling(60, 1.0, (2, 426))
    whole = engine_of(path).generate(requests, sampling, quiet)
    assert_same(whole, engine_of(path, rollout_tokens=500).generate(requests, sampling, quiet))


def test_batches_keep_the_token_budget_and_every_request():
    engine = engine_of(model_path("llama"), rollout_tokens=100)
    lens = [5, 30, 1, 99, 12, 12, 200, 3]
    batches = list(engine.batches(lens, 10))
    assert sorted(itertools.chain(*batches)) == list(range(8))
    assert all(len(b) == 1 or len(b) * (max(lens[i] for i in b) + 10) <= 100 for b in batches)
    assert batches[0] == [6]


@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_dropping_ended_rows_changes_nothing(family, monkeypatch):
    path, requests, sampling = model_path(family), requests_of(40, 40), Sampling(30, 1.0, (2, 7, 9))
    dropped = []
    plain = TransformersEngine._compact
    monkeypatch.setattr(TransformersEngine, "_compact", lambda *args: dropped.append(len(args[2])) or plain(*args))
    usual = engine_of(path).generate(requests, sampling, quiet)
    assert len(dropped) > 1
    monkeypatch.setattr(transformers_engine, "COMPACT_SHARE", 2)
    assert_same(usual, engine_of(path).generate(requests, sampling, quiet))


def test_each_response_ends_at_its_first_stop_id():
    stops = (2, 7, 9)
    rollout = engine_of(model_path("llama")).generate(requests_of(60, 40), Sampling(20, 1.0, stops), quiet)
    ends = set()
    for response, cut in zip(rollout.responses(), rollout.truncated.tolist(), strict=True):
        ids = response.tolist()
        assert not set(ids[:-1]) & set(stops)
        assert cut == (ids[-1] not in stops)
        assert len(ids) == 20 if cut else len(ids) <= 20
        ends |= {ids[-1]} & set(stops)
    assert ends == set(stops)
    assert 0 < rollout.truncated.sum() < 60


def test_truncation_keeps_the_sampled_tokens():
    """A lower limit cuts the same response earlier and writes nothing over its last token."""
    engine, requests = engine_of(model_path("llama")), requests_of(30, 40)
    long = engine.generate(requests, Sampling(21, 1.0, (2,)), quiet)
    short = engine.generate(requests, Sampling(6, 1.0, (2,)), quiet)
    for a, b, cut in zip(long.responses(), short.responses(), short.truncated.tolist(), strict=True):
        assert torch.equal(a[:6], b)
        assert cut == (b[-1] != 2)


def test_one_token_responses():
    rollout = engine_of(model_path("llama")).generate(requests_of(9, 40), Sampling(1, 1.0, (2,)), quiet)
    assert rollout.response_lens.tolist() == [1] * 9
    assert rollout.truncated.tolist() == (rollout.response_tokens != 2).tolist()


def test_stop_at_once_and_never():
    engine, requests = engine_of(model_path("llama")), requests_of(9, 40)
    at_once = engine.generate(requests, Sampling(13, 1.0, tuple(range(40))), quiet)
    assert at_once.response_lens.tolist() == [1] * 9
    assert not at_once.truncated.any()
    never = engine.generate(requests, Sampling(13, 1.0, ()), quiet)
    assert never.response_lens.tolist() == [13] * 9
    assert never.truncated.all()


def test_single_token_prompts():
    path = model_path("llama")
    rollout = engine_of(path).generate(requests_of(12, 40, lens=(1, 1)), Sampling(9, 1.0, (2,)), quiet)
    assert rollout.prompt_lens.tolist() == [1] * 12
    torch.testing.assert_close(rollout.sampler_logp.double(), reference_logp(path, rollout, 1.0), atol=1e-5, rtol=0)


def test_no_requests():
    assert len(engine_of(model_path("llama")).generate([], Sampling(4, 1.0, ()), quiet)) == 0


def test_progress_adds_up_and_the_rollout_can_be_trained_on():
    calls = []
    engine = engine_of(model_path("llama"), rollout_tokens=400)
    rollout = engine.generate(requests_of(30, 40), Sampling(21, 1.0, (2,)), lambda *call: calls.append(call))
    assert sum(tokens for tokens, _ in calls) == rollout.response_lens.sum()
    assert sum(ended for _, ended in calls) == 30
    assert len(calls) > 5
    weight = torch.ones(rollout.sampler_logp.shape, requires_grad=True)
    (weight * rollout.sampler_logp).sum().backward()  # no inference-mode tensor gets out


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state(), random.getstate()
    engine_of(model_path("llama")).generate(requests_of(4, 40), Sampling(4, 1.0, ()), quiet)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


# Early release


STOPS = (2, 7, 11, 13, 17)
"""So many that hardly a response of 30 tokens is cut."""


def longest_of(rollout) -> dict[int, int]:
    """sample index -> response tokens of its longest response."""
    out: dict[int, int] = {}
    for index, length in zip(rollout.sample_index.tolist(), rollout.response_lens.tolist(), strict=True):
        out[index] = max(length, out.get(index, 0))
    return out


def pairs_of(count: int) -> list[Request]:
    return [replace(q, sample_index=i // 2) for i, q in enumerate(requests_of(2 * count, 40))]


@pytest.mark.parametrize("check_every", [1, 4])
@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_sampling_stops_when_enough_prompts_are_whole(family, check_every, monkeypatch):
    """The kept ones are those whose longest response is shortest, with the tokens that they always have."""
    monkeypatch.setattr(transformers_engine, "CHECK_EVERY", check_every)
    engine, requests, sampling, spent = engine_of(model_path(family)), pairs_of(20), Sampling(30, 1.0, STOPS), []
    whole = engine.generate(requests, sampling, quiet)
    kept = engine.generate(requests, sampling, lambda tokens, ended: spent.append(tokens), keep=12)
    longest = longest_of(whole)
    shortest = set(sorted(longest, key=longest.__getitem__)[:12])
    assert_same(kept, whole.select([i for i, q in enumerate(requests) if q.sample_index in shortest]))
    assert kept.response_lens.max() < whole.response_lens.max()
    assert sum(spent) < whole.response_lens.sum()


def test_what_is_enough_counts_over_batches():
    """The batches of longer prompts run to their ends; the one that completes the quota stops there."""
    engine, requests, sampling = (
        engine_of(model_path("llama"), rollout_tokens=600),
        pairs_of(20),
        Sampling(30, 1.0, STOPS),
    )
    whole, spent = engine.generate(requests, sampling, quiet), []
    kept = engine.generate(requests, sampling, lambda tokens, ended: spent.append(tokens), keep=15)
    prompts = kept.sample_index.tolist()
    assert len(set(prompts)) == 15
    assert prompts == sorted(prompts)
    assert len(prompts) == 30
    assert_same(kept, whole.select([i for i, q in enumerate(requests) if q.sample_index in set(prompts)]))
    assert sum(spent) < whole.response_lens.sum()
    assert len(engine.generate(requests, sampling, quiet, keep=0)) == 0
    assert_same(engine.generate(requests, sampling, quiet, keep=20), whole)


# Speed


@pytest.mark.slow
@on_real_models
def test_not_slower_than_generate_on_one_full_batch(path):
    """CPU seconds on one thread, the least of interleaved runs; `generate(do_sample=True)` takes 1.6 times ours.

    CPU time, so that other processes on the machine do not decide; `bench_rollout.py` has the wall clock.
    """
    requests, length = requests_of(32, 512, lens=(4, 24)), 40
    engine = engine_of(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    model.generation_config.eos_token_id = None
    longest = max(len(q.prompt) for q in requests)
    ids = torch.tensor([[0] * (longest - len(q.prompt)) + list(q.prompt) for q in requests])
    mask = torch.tensor([[0] * (longest - len(q.prompt)) + [1] * len(q.prompt) for q in requests])

    def generate() -> None:
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=length, pad_token_id=0
        )
        assert out.shape[1] == longest + length

    def ours() -> None:
        engine.generate(requests, Sampling(length, 1.0, ()), quiet)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"generate": [], "ours": []}
    for _ in range(5):
        for name, run in (("generate", generate), ("ours", ours)):
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    torch.set_num_threads(threads)
    assert min(times["ours"]) <= 1.1 * min(times["generate"]), times
