"""Tiny models, requests and the float64 truth that the tests of the rollout engine share."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from rto_fast.contract import Request
from rto_fast.rollout.engine import sample_seed
from rto_fast.rollout.transformers_engine import TransformersEngine

MODELS = Path(__file__).parents[1].parent / "shared" / "models"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 128, "bos_token_id": 1}
HEADS = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": (transformers.LlamaConfig, SMALL | HEADS),
    "llama_tied": (transformers.LlamaConfig, SMALL | HEADS | {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, SMALL | HEADS),
    "gpt2": (
        transformers.GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "mistral_window": (transformers.MistralConfig, SMALL | HEADS | {"sliding_window": 8}),
    "gemma2": (transformers.Gemma2Config, SMALL | HEADS | {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "lfm2_hybrid": (
        transformers.Lfm2Config,
        SMALL
        | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"layer_types": ["conv", "full_attention"]},
    ),
    "mamba": (transformers.MambaConfig, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "bloom": (transformers.BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
}
FAST = {"llama", "llama_tied", "qwen3", "gpt2"}


MADE = tempfile.TemporaryDirectory(prefix="rto_models_")
"""Holds the models of `model_path` until the process ends."""


@functools.cache
def model_path(family: str, vocab: int = 40) -> Path:
    """Folder of a random model of the family whose softmax is far from uniform."""
    path = Path(MADE.name) / f"{family}_{vocab}"
    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(vocab_size=vocab, pad_token_id=0, **settings))
    wide = {"gemma2": 0.1, "bloom": 0.2}.get(family, 0.4)  # these two scale their embeddings up
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(0, wide if "embed" in name or "head" in name or "wte" in name else 0.2)
    model.save_pretrained(path)
    return path


on_real_models = pytest.mark.parametrize(
    "path",
    [
        pytest.param(MODELS / n, id=n, marks=pytest.mark.skipif(not (MODELS / n).is_dir(), reason=f"no {MODELS / n}"))
        for n in ("stories260k", "stories1m")
    ],
)


def engine_of(path: Path, **kwargs) -> TransformersEngine:
    return TransformersEngine(path, "cpu", torch.float32, pad_token_id=0, **kwargs)


def quiet(tokens: int, ended: int) -> None:
    """Progress that nobody watches."""


def requests_of(count: int, vocab: int, lens=(1, 24), seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            prompt=tuple(rng.randrange(vocab) for _ in range(rng.randint(*lens))),
            row=100 + i,
            sample_index=i,
            response_index=0,
            seed=sample_seed(seed, i, 0, 0),
        )
        for i in range(count)
    ]


def reference_logp(path: Path, rollout, temperature: float, stops=(), min_tokens: int = 0) -> torch.Tensor:
    """[R] float64 log-probs of a float64 forward of each sequence alone, without padding or cache.

    Of a response's first `min_tokens` tokens it is that among the tokens which are no stops.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    out = []
    with torch.no_grad():
        for tokens, start in zip(rollout.sequences(), rollout.prompt_lens.tolist(), strict=True):
            logits = model(tokens[None]).logits[0] / temperature
            logits[start - 1 : start - 1 + min_tokens, list(stops)] = float("-inf")
            logp = torch.log_softmax(logits, -1)
            out.append(logp[start - 1 : -1].gather(1, tokens[start:, None])[:, 0])
    return torch.cat(out)


def assert_same(a, b) -> None:
    """The same sequences; log-probs within rounding."""
    for name in ("tokens", "prompt_lens", "response_lens", "truncated", "rows", "sample_index"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    torch.testing.assert_close(a.sampler_logp, b.sampler_logp, atol=2e-5, rtol=0)
