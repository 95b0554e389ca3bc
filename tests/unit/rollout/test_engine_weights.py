"""The transformers engine's weights and input: pushes are complete or refused, sleep, bad requests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rollout_helpers import assert_same, engine_of, model_path, quiet, reference_logp, requests_of
from transformers import AutoModelForCausalLM

from rto_fast.config import RTOConfig
from rto_fast.contract import Request
from rto_fast.errors import RolloutError, SyncError
from rto_fast.rollout.engine import Sampling
from rto_fast.rollout.make_engine import make_engine
from rto_fast.rollout.transformers_engine import TransformersEngine

# Weights


def parameters_of(path: Path, scale: float = 1.0) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path)
    return {name: p.detach() * scale for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_push_replaces_every_weight(tmp_path, family):
    path = model_path(family)
    engine, requests, sampling = engine_of(path), requests_of(8, 40), Sampling(8, 1.0, (2,))
    before = engine.generate(requests, sampling, quiet)
    weights = parameters_of(path, 1.1)
    stats = engine.push(weights.items(), 7)
    assert stats.tensors == len(weights)
    assert stats.bytes == sum(4 * w.numel() for w in weights.values())
    assert stats.seconds > 0
    model = AutoModelForCausalLM.from_pretrained(path)
    model.load_state_dict(weights, strict=False)
    model.save_pretrained(tmp_path)
    after = engine.generate(requests, sampling, quiet)
    assert (before.version, after.version, engine.version) == (0, 7, 7)
    assert (reference_logp(path, after, 1.0) - after.sampler_logp).abs().max() > 1e-2
    torch.testing.assert_close(after.sampler_logp.double(), reference_logp(tmp_path, after, 1.0), atol=1e-5, rtol=0)


def test_push_takes_a_tied_name_once_or_twice():
    engine = engine_of(model_path("llama_tied"))
    weights = parameters_of(model_path("llama_tied"))
    embedding = weights["model.embed_tokens.weight"]
    assert "lm_head.weight" not in weights
    engine.push({**weights, "lm_head.weight": embedding}.items(), 1)
    only_head = {k: v for k, v in weights.items() if k != "model.embed_tokens.weight"}
    engine.push({**only_head, "lm_head.weight": embedding}.items(), 2)
    with pytest.raises(SyncError, match=r"lm_head\.weight: tied to model\.embed_tokens\.weight"):
        engine.push({**weights, "lm_head.weight": embedding + 1}.items(), 3)


def test_push_casts_to_the_engine_dtype():
    path = model_path("llama")
    engine = TransformersEngine(path, "cpu", torch.bfloat16, pad_token_id=0)
    stats = engine.push(parameters_of(path, 1.01).items(), 1)
    assert stats.bytes == sum(4 * w.numel() for w in parameters_of(path).values())
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    rollout = engine.generate(requests_of(6, 40), Sampling(6, 1.0, (2,)), quiet)
    assert rollout.sampler_logp.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"model\.norm\.weight: never taken \(1 of"),
        ("extra", r"model\.extra\.weight: pushed, but"),
        ("twice", r"model\.norm\.weight: pushed twice"),
        ("shape", r"model\.norm\.weight: pushed with shape \[0\].*has \[32\]"),
    ],
)
def test_push_refuses_another_set_of_names(change, message):
    path = model_path("llama")
    engine, weights = engine_of(path), parameters_of(path)
    pairs = [(k, v) for k, v in weights.items() if k != "model.norm.weight" or change not in ("missing", "shape")]
    norm = weights["model.norm.weight"]
    pairs += {
        "missing": [],
        "extra": [("model.extra.weight", norm)],
        "twice": [("model.norm.weight", norm)],
        "shape": [("model.norm.weight", norm[:0])],
    }[change]
    with pytest.raises(SyncError, match=message):
        engine.push(iter(pairs), 1)
    with pytest.raises(SyncError, match="incomplete"):  # a mixture of old and new weights samples nothing
        engine.generate(requests_of(2, 40), Sampling(2, 1.0, ()), quiet)
    engine.push(weights.items(), 2)
    assert engine.generate(requests_of(2, 40), Sampling(2, 1.0, ()), quiet).version == 2


def test_push_whose_source_breaks_leaves_the_engine_unusable():
    engine, weights = engine_of(model_path("llama")), parameters_of(model_path("llama"))

    def broken():
        yield next(iter(weights.items()))
        raise OSError("gather failed")

    with pytest.raises(OSError, match="gather failed"):
        engine.push(broken(), 1)
    with pytest.raises(SyncError, match="did not end"):
        engine.generate(requests_of(2, 40), Sampling(2, 1.0, ()), quiet)


def test_sleep_and_wake():
    engine, requests, sampling = engine_of(model_path("llama")), requests_of(4, 40), Sampling(4, 1.0, ())
    before = engine.generate(requests, sampling, quiet)
    engine.sleep()
    engine.sleep()
    with pytest.raises(RolloutError, match="asleep"):
        engine.generate(requests, sampling, quiet)
    engine.push(parameters_of(model_path("llama")).items(), 1)
    engine.wake()
    assert_same(before, engine.generate(requests, sampling, quiet))


# Bad input


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), r"request 0 \(row 5\): the prompt is empty"),
        ((3, 40), r"request 0 \(row 5\): a prompt token is not in \[0, 40\)"),
        ((-1,), r"not in \[0, 40\)"),
        ((1,) * 125, r"125 prompt tokens \+ max_tokens 4 exceed the model's 128 positions"),
    ],
)
def test_prompts_that_cannot_be_sampled_from(prompt, message):
    with pytest.raises(ValueError, match=message):
        engine_of(model_path("llama")).generate([Request(prompt, 5, 0, 0, 1)], Sampling(4, 1.0, ()), quiet)


def test_a_least_length_that_leaves_no_token():
    """Every logit would be -inf, and every probability NaN."""
    engine, request = engine_of(model_path("llama")), Request((3,), 5, 0, 0, 1)
    for stops in (tuple(range(40)), tuple(range(-3, 99))):
        with pytest.raises(ValueError, match=r"min_tokens 2: each of the 40 tokens ends a response"):
            engine.generate([request], Sampling(4, 1.0, stops, 2), quiet)
    assert engine.generate([request], Sampling(4, 1.0, tuple(range(40))), quiet).response_lens.tolist() == [1]
    assert engine.generate([request], Sampling(4, 1.0, tuple(range(39)), 2), quiet).tokens.tolist()[1:3] == [39, 39]


@pytest.mark.parametrize("settings", [(0, 1.0), (4, 0.0), (4, float("nan"))])
def test_sampling_that_cannot_work(settings):
    with pytest.raises(ValueError, match=r"max_tokens|temperature"):
        Sampling(*settings, ())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_diverged(value):
    path = model_path("llama")
    engine, weights = engine_of(path), parameters_of(path)
    weights["model.norm.weight"][3] = value
    engine.push(weights.items(), 9)
    with pytest.raises(RolloutError, match=r"not finite at prompt row 10\d; its weights \(version 9\)"):
        engine.generate(requests_of(3, 40), Sampling(6, 1.0, ()), quiet)


def test_a_checkpoint_without_all_weights_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_path("llama"))
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks \['lm_head\.weight'\]"):
        engine_of(tmp_path)


def test_a_model_without_a_key_value_cache_is_refused():
    with pytest.raises(ValueError, match="MambaForCausalLM has no key-value cache"):
        engine_of(model_path("mamba"))


@pytest.mark.parametrize("name", ["auto", "transformers"])
def test_make_engine(name):
    config = RTOConfig(rollout_engine=name, rollout_tokens=77)
    engine = make_engine(config, model_path("llama"), "cpu", torch.float32, 0)
    assert isinstance(engine, TransformersEngine)
    assert engine.rollout_tokens == 77
