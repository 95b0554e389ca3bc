"""Rollouts of the transformers engine beside vLLM's and `model.generate` on the same prompts, one full batch.

    pytest bench/iteration/bench_rollout.py --benchmark-only
    .venv-vllm/bin/pytest bench/iteration/bench_rollout.py --benchmark-only    # after `make install-vllm`: vLLM too

On a busy machine, CPU seconds of one thread instead of the wall clock:

    OMP_NUM_THREADS=1 pytest bench/iteration/bench_rollout.py --benchmark-only --benchmark-timer=time.process_time

Every response runs to its length (no stop id), so that both sample the same number of tokens; `tokens_per_s` is
in each row's extra info. The `stops` rows end responses at sampled stop ids, where `generate` computes ended
rows to the end. `demo` is a random Llama of 2 layers x 64 with 512 requests, the shape of `make demo`; `demo_heads_32`
has two heads of 32 in place of four of 16, which vLLM on a CPU lacks. The faster of the two engines on it is the one
that the demo names.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from rto_fast.contract import Request
from rto_fast.rollout.engine import Sampling, sample_seed
from rto_fast.rollout.transformers_engine import TransformersEngine
from rto_fast.rollout.vllm_engines.colocated import VLLMEngine
from rto_fast.rollout.vllm_engines.support import unusable

MODELS = Path(__file__).parents[2].parent / "shared" / "models"
DEMO = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}  # fmt: skip
HEADS = {"demo": 4, "demo_heads_32": 2}
CASES = {  # model: (requests, response tokens)
    "stories260k": (64, 96),
    "stories1m": (64, 96),
    "demo": (512, 32),
    "demo_heads_32": (512, 32),
}
ROUNDS = 5


@pytest.fixture(params=CASES)
def case(request, tmp_path) -> tuple[Path, list[Request], int]:
    """(model folder, requests of 4 to 24 prompt tokens, response tokens)."""
    count, length = CASES[request.param]
    if heads := HEADS.get(request.param):
        torch.manual_seed(0)
        shape = LlamaConfig(**DEMO, num_attention_heads=heads, num_key_value_heads=heads)
        AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
        path, vocab = tmp_path, shape.vocab_size
    else:
        path, vocab = MODELS / request.param, 512
        if not path.is_dir():
            pytest.skip(f"no test model at {path}")
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(3, vocab) for _ in range(rng.randint(4, 24))) for _ in range(count)]
    return path, [Request(p, i, i, 0, sample_seed(0, i, 0, 0)) for i, p in enumerate(prompts)], length


def padded(requests: list[Request]) -> tuple[Tensor, Tensor]:
    """Left-padded [B, P] token ids and attention mask."""
    longest = max(len(q.prompt) for q in requests)
    ids = torch.tensor([[0] * (longest - len(q.prompt)) + list(q.prompt) for q in requests])
    mask = torch.tensor([[0] * (longest - len(q.prompt)) + [1] * len(q.prompt) for q in requests])
    return ids, mask


def measure(benchmark, run, tokens: int) -> None:
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["tokens_per_s"] = round(tokens / benchmark.stats.stats.min)
    benchmark.extra_info["threads"] = torch.get_num_threads()


def test_engine(benchmark, case):
    path, requests, length = case
    engine = TransformersEngine(path, "cpu", torch.float32, pad_token_id=0)
    sampling = Sampling(length, 1.0, ())
    measure(benchmark, lambda: engine.generate(requests, sampling, lambda *_: None), len(requests) * length)


def test_vllm(benchmark, case):
    path, requests, length = case
    if reason := unusable(path, torch.device("cpu")):
        pytest.skip(reason)
    longest = max(len(q.prompt) for q in requests) + length
    engine = VLLMEngine(path, "cpu", torch.float32, max_length=longest)
    sampling = Sampling(length, 1.0, ())
    measure(benchmark, lambda: engine.generate(requests, sampling, lambda *_: None), len(requests) * length)
    engine.close()


def test_generate(benchmark, case):
    path, requests, length = case
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    model.generation_config.eos_token_id = None
    ids, mask = padded(requests)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": length, "pad_token_id": 0}
    measure(
        benchmark,
        lambda: model.generate(input_ids=ids, attention_mask=mask, **settings),
        len(requests) * length,
    )


STOPS = (2, 10, 20, 30)


def test_engine_stops(benchmark, case):
    path, requests, length = case
    engine = TransformersEngine(path, "cpu", torch.float32, pad_token_id=0)
    sampling = Sampling(length, 1.0, STOPS)
    tokens = len(engine.generate(requests, sampling, lambda *_: None).response_tokens)
    measure(benchmark, lambda: engine.generate(requests, sampling, lambda *_: None), tokens)


def test_generate_stops(benchmark, case):
    path, requests, length = case
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids, mask = padded(requests)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": length, "pad_token_id": 0}

    def run() -> Tensor:
        return model.generate(input_ids=ids, attention_mask=mask, eos_token_id=list(STOPS), **settings)

    tokens = int((run()[:, ids.shape[1] :] != 0).sum())
    measure(benchmark, run, tokens)
