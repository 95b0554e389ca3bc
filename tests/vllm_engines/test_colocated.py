"""Real vLLM on this machine: its log-probs are the trainer's after every push, and other weights are refused."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace

import pytest
import torch
from engine_helpers import CPU, MARKS, ROUNDING, moved
from loop_helpers import write_rows
from recipe_helpers import flags_of
from rollout_helpers import quiet, reference_logp, requests_of
from transformers import AutoModelForCausalLM

from rto_fast.config import RTOConfig
from rto_fast.contract import Request
from rto_fast.errors import ConfigError, EngineFailure, RolloutError, SyncError
from rto_fast.generate import GenerateConfig, generate
from rto_fast.rollout.engine import GREEDY, Sampling, sample_seed
from rto_fast.rollout.make_engine import make_engine
from rto_fast.rollout.transformers_engine import TransformersEngine
from rto_fast.rollout.vllm_engines import colocated, support
from rto_fast.rollout.vllm_engines.colocated import VLLMEngine

pytestmark = MARKS


# Log-probs


def test_no_response_ends_before_its_least_length(tied, make):
    engine, requests, stops, least = make(tied.policy), requests_of(24, 80), tuple(range(1, 10)), 5  # EOS is 1
    assert int(engine.generate(requests, Sampling(16, 0.7, stops), quiet).response_lens.min()) <= least
    rollout = engine.generate(requests, Sampling(16, 0.7, stops, least), quiet)
    assert int(rollout.response_lens.min()) == least + 1
    truth = reference_logp(tied.policy, rollout, 0.7, stops, least)
    torch.testing.assert_close(rollout.sampler_logp.double(), truth, atol=ROUNDING, rtol=0)


def test_log_probs_before_and_after_a_push(models, make, tmp_path):
    engine, requests, sampling = make(models.policy), requests_of(12, 80), Sampling(16, 0.7, (2,))
    first = engine.generate(requests, sampling, quiet)
    torch.testing.assert_close(
        first.sampler_logp.double(), reference_logp(models.policy, first, 0.7), atol=ROUNDING, rtol=0
    )
    weights = moved(models.policy, 0.3)
    stats = engine.push(weights.items(), 4)
    assert stats.bytes == sum(4 * w.numel() for w in weights.values())
    assert stats.digests.keys() == weights.keys()
    model = AutoModelForCausalLM.from_pretrained(models.policy)
    model.load_state_dict(weights, strict=False)
    model.save_pretrained(tmp_path)
    second = engine.generate(requests, sampling, quiet)
    assert (first.version, second.version) == (0, 4)
    assert (reference_logp(models.policy, second, 0.7) - second.sampler_logp).abs().max() > 0.1
    torch.testing.assert_close(
        second.sampler_logp.double(), reference_logp(tmp_path, second, 0.7), atol=ROUNDING, rtol=0
    )
    turned = engine.generate(requests[::-1], sampling, quiet).select(range(11, -1, -1))
    assert torch.equal(turned.tokens, second.tokens)
    assert torch.equal(turned.sampler_logp, second.sampler_logp)
    alone = engine.generate(requests[5:6], sampling, quiet)
    assert torch.equal(alone.response_tokens, second.select([5]).response_tokens)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_come_from_the_policys_softmax(tied, make, temperature):
    """Chi-square of 20,000 first tokens against the exact distribution, before and after a push."""
    engine, prompt = make(tied.policy, max_sequences=512), (1, 7, 9)
    model = AutoModelForCausalLM.from_pretrained(tied.policy, dtype=torch.float64)
    for version in (0, 1):
        if version:
            weights = moved(tied.policy, 0.2)
            engine.push(weights.items(), version)
            model.load_state_dict(weights, strict=False)
        requests = [Request(prompt, 0, i, 0, sample_seed(version, i, 0, 0)) for i in range(20_000)]
        tokens = engine.generate(requests, Sampling(1, temperature, ()), quiet).response_tokens
        with torch.no_grad():
            p = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / temperature, -1)
        counts, expected = torch.bincount(tokens, minlength=len(p)).double(), 20_000 * p
        rare = expected < 5
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None].clamp(min=1e-9)])
        statistic, freedom = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 8, (statistic, freedom)


def test_sampling_stops_when_enough_prompts_are_whole(tied, make):
    """The kept prompts are those whose longest response is shortest; what was dropped leaves no trace."""
    engine, sampling, spent = make(tied.policy), Sampling(30, 1.0, tuple(range(2, 10))), []
    requests = [replace(q, sample_index=i // 2) for i, q in enumerate(requests_of(24, 80))]
    full = engine.generate(requests, sampling, quiet)
    longest = full.response_lens.view(12, 2).max(1).values
    kept = engine.generate(requests, sampling, lambda tokens, ended: spent.append(tokens), keep=7)
    shortest = set(longest.sort(stable=True).indices[:7].tolist())
    expected = full.select([i for i in range(24) if i // 2 in shortest])
    assert torch.equal(kept.tokens, expected.tokens)
    assert torch.equal(kept.sampler_logp, expected.sampler_logp)
    assert torch.equal(kept.truncated, expected.truncated)
    assert sum(spent) < full.response_lens.sum()
    engine.push(moved(tied.policy, 0.0).items(), 1)  # no request holds on to the cache
    again = engine.generate(requests, sampling, quiet)
    assert torch.equal(again.tokens, full.tokens)
    assert len(engine.generate(requests, sampling, quiet, keep=0)) == 0


def test_flat_log_probs_are_the_same_bits(tied, make, monkeypatch):
    """vLLM's flat lists hold what its objects hold, one dict a token."""
    import vllm

    engine, requests, sampling, asked = make(tied.policy), requests_of(12, 80), Sampling(16, 0.7, (2,)), []
    flat = engine.generate(requests, sampling, quiet)
    plain = vllm.SamplingParams

    def unflat(**settings):
        asked.append(settings.pop("flat_logprobs"))
        return plain(**settings)

    def logps(objects, tokens):
        return [at[token].logprob for at, token in zip(objects or (), tokens, strict=True)]

    monkeypatch.setattr(vllm, "SamplingParams", unflat)
    monkeypatch.setattr(colocated, "_logps", logps)
    whole = engine.generate(requests, sampling, quiet)
    assert asked == [True] * len(requests)
    assert torch.equal(whole.tokens, flat.tokens)
    assert torch.equal(whole.sampler_logp, flat.sampler_logp)


def test_a_step_takes_few_tokens(tied, make):
    """Or as many as there are sequences, of which each gives one."""
    for sequences, tokens in ((64, 4096), (5000, 5000)):
        engine = make(tied.policy, max_sequences=sequences)
        assert engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens == tokens


def test_a_fault_while_requests_are_dropped(tied, make, monkeypatch):
    engine, requests = make(tied.policy), [replace(q, sample_index=i // 2) for i, q in enumerate(requests_of(24, 80))]
    core = engine.llm.llm_engine
    plain = core.abort_request

    def abort(names):
        plain(names)
        monkeypatch.setattr(core, "step", broken)

    def broken():
        raise RuntimeError("cancelled")

    monkeypatch.setattr(core, "abort_request", abort)
    with pytest.raises(EngineFailure, match=r"sampling with vLLM failed .*cancelled"):
        engine.generate(requests, Sampling(30, 1.0, tuple(range(2, 10))), quiet, keep=7)


def test_log_probs_must_be_those_of_the_tokens(tied, make, monkeypatch):
    from vllm.logprobs import FlatLogprobs

    engine, plain = make(tied.policy), FlatLogprobs.append_fast

    def shifted(flat, token_ids, *args):
        plain(flat, [token + 1 for token in token_ids], *args)

    monkeypatch.setattr(FlatLogprobs, "append_fast", shifted)
    with pytest.raises(EngineFailure, match="not those of the tokens"):
        engine.generate(requests_of(2, 80), Sampling(2, 1.0, ()), quiet)


# Pushes


def test_a_push_leaves_nothing_behind(tied, make):
    """No tensor of a push outlives it; else a long run would hold every version of its policy."""
    engine, pushed = make(tied.policy), []
    for version in range(3):
        weights = moved(tied.policy, 0.1)
        pushed += [weakref.ref(w) for w in weights.values()]
        engine.push(weights.items(), version)
        del weights
    with pytest.raises(SyncError):
        engine.push(iter([("model.norm.weight", torch.ones(3))]), 3)
    engine.push(moved(tied.policy, 0.1).items(), 4)
    gc.collect()
    assert len(pushed) > 50
    assert not [p for p in pushed if p() is not None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.self_attn.k_proj.weight"), r"model\.layers\.1\.self_attn"),
        (lambda w: w.pop("model.norm.weight"), r"model\.norm"),
        (lambda w: w.update(extra=torch.zeros(2)), "extra: pushed, but"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), r"model\.norm\.weight: pushed with shape \[3\]"),
    ],
)
def test_a_push_of_other_weights_is_refused(tied, make, change, message):
    engine, weights = make(tied.policy), moved(tied.policy, 0.1)
    change(weights)
    with pytest.raises(SyncError, match=message):
        engine.push(weights.items(), 1)
    with pytest.raises(SyncError, match="incomplete"):
        engine.generate(requests_of(2, 80), Sampling(2, 1.0, ()), quiet)


def test_too_little_memory_for_one_sequence(tied, one_rank):
    with pytest.raises(ConfigError, match=r"vllm_memory_share: vLLM does not start .*memory"):
        VLLMEngine(tied.policy, CPU, torch.float32, max_length=64, memory_share=1e-8)


def test_a_model_that_cannot_be_split(tied, one_rank):
    with pytest.raises(ConfigError, match="vllm_tensor_parallel: 2 attention heads cannot be split over 3 ranks"):
        VLLMEngine(tied.policy, CPU, torch.float32, max_length=64, tensor_parallel=3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_step_that_hangs_ends_the_process(tied, make, monkeypatch):
    """One that returns late, for that matter, gives way to a new engine; here both come to pass."""
    engine, codes = make(tied.policy), []

    def leave(code):
        codes.append(code)
        raise SystemExit  # ends the watchdog's thread alone

    engine.timeout_s, step = 0.2, engine.llm.llm_engine.step
    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr(engine.llm.llm_engine, "step", lambda: (time.sleep(2), step())[1])
    with pytest.raises(EngineFailure, match=r"one step of vLLM took longer than 0\.2 s"):
        engine.generate(requests_of(2, 80), Sampling(2, 1.0, ()), quiet)
    assert codes == [3]


def test_temperatures(tied, make):
    engine, requests = make(tied.policy), requests_of(6, 80)
    likeliest = TransformersEngine(tied.policy, CPU, torch.float32, 0).generate(
        requests, Sampling(8, GREEDY, ()), quiet
    )
    assert torch.equal(engine.generate(requests, Sampling(8, GREEDY, ()), quiet).tokens, likeliest.tokens)
    with pytest.raises(ValueError, match=r"temperature: vLLM samples at 0\.01 or more, got 0\.005"):
        engine.generate(requests, Sampling(8, 0.005, ()), quiet)


def test_weights_that_diverged(tied, make):
    engine, weights = make(tied.policy), moved(tied.policy, 0.1)
    weights["model.norm.weight"][3] = float("nan")
    engine.push(weights.items(), 1)
    with pytest.raises(RolloutError, match="not finite at prompt row"):
        engine.generate(requests_of(2, 80), Sampling(4, 1.0, ()), quiet)


# Which engine


def test_answers_to_a_benchmark(tied, tmp_path, launch):
    """`rto_fast.generate` with vLLM, from the command line; greedy answers are the transformers engine's."""
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": f"A {w} fox ran."} for w in ("sad", "proud", "calm")])
    settings = {"model": tied.policy, "data": data, "dtype": "fp32", "max_response_length": 8, "greedy": True,
                "generator": "x", "min_response_length": 6}  # fmt: skip
    other = generate(GenerateConfig(**settings, rollout_engine="transformers", output=str(tmp_path / "other.jsonl")))
    ours = tmp_path / "vllm.jsonl"
    result = launch(["-m", "rto_fast.generate", *flags_of(settings | {"rollout_engine": "vllm", "output": ours})])
    assert result.returncode == 0, result.output
    assert ours.read_text() == other.read_text()
    assert ours.read_text().count("\n") == 3


def test_auto_takes_vllm_where_it_knows_the_model(tied, tiny, one_rank, monkeypatch):
    config = RTOConfig(max_prompt_length=16, max_response_length=8, vllm_max_sequences=4)
    engine = make_engine(config, tied.policy, CPU, torch.float32, 0)
    assert isinstance(engine, VLLMEngine)
    engine.close()
    assert isinstance(make_engine(config, tiny.policy, CPU, torch.float32, 0), TransformersEngine)  # heads of 8
    with pytest.raises(ConfigError, match="no attention for heads of 8"):
        VLLMEngine(tiny.policy, CPU, torch.float32, max_length=24)
    monkeypatch.setattr(support, "installed", lambda: "0.25.1")
    with pytest.raises(ConfigError, match=r"vLLM 0\.25\.1 is too old \(0\.26 or newer is needed\)"):
        VLLMEngine(tied.policy, CPU, torch.float32, max_length=24)
