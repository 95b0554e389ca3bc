"""What measure.py and largest.py measure with: models of random weights, engines of fixed lengths, a clock."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from bench.harness import ON_GPU

LENGTHS = "prompts uniform; responses log-normal, median 0.4 of the limit, sigma 0.6, clipped to [16, limit]"
PAD, STOP = 0, 1
SEED = 0

try:
    from rto_fast import distributed
    from rto_fast.backend.frozen import FrozenModel
    from rto_fast.backend.train_engine import TrainEngine
    from rto_fast.config import RTOConfig
    from rto_fast.contract import Request
    from rto_fast.models.attention import resolve_attention
    from rto_fast.models.heads import PolicyModel, ScalarModel
    from rto_fast.models.load import DTYPES
    from rto_fast.models.packing import Placement
    from rto_fast.models.save import export
    from rto_fast.rollout.engine import sample_seed
    from rto_fast.rollout.make_engine import make_engine
    from rto_fast.rollout.transformers_engine import TransformersEngine
    from rto_fast.scoring.reward_model import ModelReward
    from rto_fast.scoring.score import Scorers
except ImportError as error:  # DeepSpeed, mostly: without it there is no trainer to time
    MISSING = f"{error.name or error} is not importable"
else:
    MISSING = ""


@dataclass(frozen=True)
class Shape:
    """Models and workload."""

    model: dict[str, Any]
    sequences: int
    prompt: tuple[int, int]
    response: int
    released: int
    """Sequences that the released path runs."""
    micro_tokens: int = 32768
    rollout_tokens: int = 262144
    dtype: str = "bf16"


LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
TOY = {
    "vocab_size": 307, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
SHAPES = {
    "llama-1b": Shape(LLAMA_1B, 128, (512, 1024), 1024, 16),
    "llama-8b": Shape(LLAMA_8B, 32, (512, 1024), 1024, 0),
    "toy": Shape(TOY, 8, (5, 12), 40, 8, micro_tokens=128, rollout_tokens=512, dtype="fp32"),
}


def draw(shape: Shape) -> tuple[list[Request], list[int]]:
    """(requests, response lengths), the same for every engine."""
    rng = random.Random(SEED)
    requests, lengths = [], []
    for i in range(shape.sequences):
        prompt = tuple(rng.randrange(2, shape.model["vocab_size"]) for _ in range(rng.randint(*shape.prompt)))
        requests.append(Request(prompt, i, i, 0, sample_seed(SEED, i, 0, 0)))
        length = round(rng.lognormvariate(0, 0.6) * 0.4 * shape.response)
        lengths.append(min(max(length, min(16, shape.response)), shape.response))
    return requests, lengths


# The models


@dataclass
class Parts:
    """What one iteration needs; `run` of updates.ppo.TrainBatch too."""

    shape: Shape
    config: RTOConfig
    placement: Placement
    policy: TrainEngine
    critic: TrainEngine
    reference: PolicyModel
    dpo: PolicyModel
    reward_model: ScalarModel
    folder: Path
    """The policy as a Hugging Face folder, for the rollout engines."""
    ptx: None = None

    @property
    def scorers(self) -> Scorers:
        frozen = [FrozenModel(m, self.placement.device, parks=False) for m in (self.reference, self.dpo)]
        return Scorers(
            policy=self.policy.evaluate, critic=self.critic.evaluate, reference=frozen[0], dpo=frozen[1],
            dpo_ref=frozen[0], tokens=(), rewards=[ModelReward("model", self.reward_model, self.placement)],
            reward_weights=(1.0,), frozen=frozen,
        )  # fmt: skip


def config_of(shape: Shape, **changes: Any) -> RTOConfig:
    return RTOConfig(
        dtype=shape.dtype, rollout_batch=shape.sequences, train_batch=shape.sequences,
        micro_tokens=shape.micro_tokens, score_tokens=shape.micro_tokens, rollout_tokens=shape.rollout_tokens,
        max_prompt_length=shape.prompt[1], max_response_length=shape.response, warmup_ratio=0.0, **changes,
    )  # fmt: skip


def random_model(kind: type, shape: Shape, seed: int, attention: str, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(**shape.model, pad_token_id=PAD, eos_token_id=STOP, bos_token_id=None, num_labels=1)
    settings = {"dtype": DTYPES[shape.dtype], "attn_implementation": attention}
    with torch.device(device):
        inner = kind.from_config(config, **settings)
    return PolicyModel(inner) if kind is AutoModelForCausalLM else ScalarModel(inner)


def build(shape: Shape, folder: Path, **changes: Any) -> Parts:
    device = distributed.init()
    config = config_of(shape, **changes)
    attention, kernel = resolve_attention("auto", device, DTYPES[shape.dtype])
    lm, classifier = AutoModelForCausalLM, AutoModelForSequenceClassification
    policy = random_model(lm, shape, 1, attention, device)
    export(policy, folder, write=True)
    frozen = [
        random_model(kind, shape, seed, attention, device).eval().requires_grad_(False)
        for kind, seed in ((lm, 2), (lm, 3), (classifier, 4))
    ]
    critic = random_model(classifier, shape, 4, attention, device)
    return Parts(
        shape, config, Placement(device, kernel, lockstep=False, micro_tokens=config.score_tokens),
        # A learning rate of 0: the steps cost the same, and every path starts from the same weights.
        TrainEngine(policy, config, peak_lr=0.0, total_steps=1),
        TrainEngine(critic, config, peak_lr=0.0, total_steps=1),
        *frozen, folder,
    )  # fmt: skip


# Rollout engines with fixed lengths


def _fixed_lengths(lengths: Sequence[int]) -> type:
    """The transformers engine, ending response i with its lengths[i]-th token and no sooner."""

    class FixedLengths(TransformersEngine):
        def _run(self, requests, *args):
            self.ends = torch.tensor([lengths[q.row] for q in requests], device=self.device)
            return super()._run(requests, *args)

        def prefill(self, requests, max_tokens):
            batch, logits = super().prefill(requests, max_tokens)
            self.prompt, self.live = batch.width, self.ends
            return batch, self._plan(batch, logits)

        def forward(self, batch):
            return self._plan(batch, super().forward(batch))

        def _compact(self, batch, ended):
            super()._compact(batch, ended)
            self.live = self.ends[torch.tensor(batch.index, device=self.device)]

        def _plan(self, batch, logits):
            last = self.live == batch.width - self.prompt + 1
            logits = logits.masked_fill(last[:, None], -torch.inf)
            logits[:, STOP] = torch.where(last, 0.0, -torch.inf)
            return logits

    return FixedLengths


def transformers_engine(parts: Parts, lengths: Sequence[int]) -> TransformersEngine:
    dtype = DTYPES[parts.config.dtype]
    return _fixed_lengths(lengths)(parts.folder, parts.placement.device, dtype, PAD, parts.config.rollout_tokens)


def vllm_engine(parts: Parts):
    config = replace(parts.config, rollout_engine="vllm")
    return make_engine(config, parts.folder, parts.placement.device, DTYPES[config.dtype], PAD)


@contextmanager
def vllm_lengths(requests: Sequence[Request], lengths: Sequence[int]) -> Iterator[None]:
    """Inside, vLLM gives each request its own limit; a request is known by its seed."""
    import vllm

    limits = {q.seed: lengths[q.row] for q in requests}
    make = vllm.SamplingParams

    def planned(**settings):
        return make(**settings | {"max_tokens": limits[settings["seed"]], "stop_token_ids": []})

    with mock.patch.object(vllm, "SamplingParams", planned):
        yield


# Time


@dataclass
class Phase:
    seconds: float
    tokens: int
    peak_gb: float | None


class Clock:
    """Seconds, tokens and peak memory of named phases, with the device idle at both ends."""

    def __init__(self) -> None:
        self.phases: dict[str, list[Phase]] = {}

    @contextmanager
    def phase(self, name: str, tokens: int) -> Iterator[None]:
        if ON_GPU:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        if ON_GPU:
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else None
        self.phases.setdefault(name, []).append(Phase(took, tokens, peak))

    def record(self) -> dict[str, dict[str, float]]:
        """Medians and spreads of the repeats of each phase."""
        out = {}
        for name, repeats in self.phases.items():
            times = [p.seconds for p in repeats]
            median = statistics.median(times)
            out[name] = {
                "seconds": median, "spread_s": max(times) - min(times), "repeats": len(times),
                "tokens": repeats[0].tokens, "tokens_per_s": repeats[0].tokens / median if median else None,
                "peak_gb": max((p.peak_gb for p in repeats if p.peak_gb is not None), default=None),
            }  # fmt: skip
        return out


class Minutes:
    """What is left of the section's time; nothing is started that probably does not fit."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def freed() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def attempt(record: dict, what: str, job: Callable[[], object]) -> None:
    """A path that cannot run leaves its reason and stops nothing else."""
    try:
        job()
    except Exception as problem:  # out of memory, a package that is missing, a peer's own error
        record["not_run"][what] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
    freed()
