"""One RTO iteration on one device, phase by phase: ours, ours with one thing switched off, the released data path.

    python bench/iteration.py --minutes 10      writes run/iteration of bench/results/<device>.json

Weights are random: time and memory do not depend on them, what is sampled means nothing. Response lengths are
drawn beforehand (`LENGTHS`) and forced on every engine, so that all of them sample the same number of tokens.
The released path (released.py) runs on the first sequences only, since its cost is the same for every
micro-batch of 4; rates are per token of prompt and response, and the optimiser's step stands apart.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import ON_GPU, RUN, clocks, commit, save, versions
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

LENGTHS = "prompts uniform; responses log-normal, median 0.4 of the limit, sigma 0.6, clipped to [16, limit]"
PAD, STOP = 0, 1
SEED = 0
# How far another path's losses and gradient norms may be from ours: no figure for one that computes something else.
ROUNDING = {"fp32": 1e-3, "bf16": 0.2}

try:
    import released
    from ablation import ABLATION

    from rto_fast import algo, distributed, models, scoring
    from rto_fast.assembly import FrozenModel
    from rto_fast.attention import resolve_attention
    from rto_fast.batch import Request, Rollout, Scores, Targets
    from rto_fast.config import RTOConfig
    from rto_fast.engine import DTYPES, TrainEngine
    from rto_fast.models import PolicyModel, ScalarModel
    from rto_fast.packing import Placement
    from rto_fast.ppo_update import TrainBatch
    from rto_fast.rewards import ResponseTexts
    from rto_fast.rollout import Sampling, make_engine, sample_seed
    from rto_fast.transformers_engine import TransformersEngine
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
    """What one iteration needs; `run` of ppo_update.TrainBatch too."""

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

    @property
    def scorers(self) -> scoring.Scorers:
        frozen = [FrozenModel(m, self.placement.device, parks=False) for m in (self.reference, self.dpo)]
        return scoring.Scorers(
            policy=self.policy.evaluate, critic=self.critic.evaluate, reference=frozen[0], dpo=frozen[1],
            dpo_ref=frozen[0], rewards=[scoring.ModelReward("model", self.reward_model, self.placement)],
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
    models.export(policy, folder, write=True)
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

        def _prefill(self, requests, max_tokens):
            batch, logits = super()._prefill(requests, max_tokens)
            self.prompt, self.live = batch.width, self.ends
            return batch, self._plan(batch, logits)

        def _forward(self, batch):
            return self._plan(batch, super()._forward(batch))

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


# Phases


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


def texts_of(rollout: Rollout) -> ResponseTexts:
    return ResponseTexts([""] * len(rollout), [""] * len(rollout), [[]] * len(rollout))


def score_and_targets(parts: Parts, rollout: Rollout, clock: Clock) -> tuple[Scores, Targets]:
    tokens = len(rollout.tokens)
    with clock.phase("score", tokens):
        scores, _ = scoring.score(
            rollout, texts_of(rollout), parts.scorers, parts.config, parts.placement, lambda _: None
        )
    with clock.phase("targets", len(scores.values)):
        targets = algo.targets(rollout, scores, parts.config, parts.config.beta2)
    return scores, targets


def our_updates(parts: Parts, rollout: Rollout, scores: Scores, targets: Targets, clock: Clock) -> dict[str, float]:
    batch = TrainBatch(parts, rollout, scores, targets, list(range(len(rollout))))
    tokens = len(rollout.tokens)
    with timed_steps(parts) as step:
        with clock.phase("train policy", tokens):
            policy = batch.update_policy(0)
        with clock.phase("train critic", tokens):
            critic = batch.update_critic(0)
    clock.phases.setdefault("optimiser (inside train)", []).append(Phase(step.seconds, tokens, None))
    return {
        "policy_loss": policy.loss, "value_loss": critic.loss,
        "policy_norm": policy.result.grad_norm, "critic_norm": critic.result.grad_norm,
    }  # fmt: skip


def released_updates(
    parts: Parts, experiences: Sequence[released.Experience], tokens: int, clock: Clock
) -> dict[str, float]:
    config, whitening = parts.config, released.whiten(experiences)
    responses = sum(len(e.values) for e in experiences)
    sums = {"policy_loss": 0.0, "value_loss": 0.0}

    def counted(name: str, loss: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        def of(part):
            value = loss(part)
            sums[name] += float(value.detach())
            return value

        return of

    policy = counted("policy_loss", lambda e: released.policy_loss(parts.policy, e, whitening, responses, config))
    value = counted("value_loss", lambda e: released.value_loss(parts.critic, e, responses, config))
    with timed_steps(parts) as step:
        with clock.phase("train policy", tokens):
            policy_step = parts.policy.update(experiences, policy, step=0)
        with clock.phase("train critic", tokens):
            critic_step = parts.critic.update(experiences, value, step=0)
    clock.phases.setdefault("optimiser (inside train)", []).append(Phase(step.seconds, tokens, None))
    return sums | {"policy_norm": policy_step.grad_norm, "critic_norm": critic_step.grad_norm}


@dataclass
class Steps:
    seconds: float = 0.0


@contextmanager
def timed_steps(parts: Parts) -> Iterator[Steps]:
    """Counts the seconds of the optimisers' steps, which cost the same whatever the batch."""
    steps = Steps()

    def timed(step):
        def run(*args, **kwargs):
            if ON_GPU:
                torch.cuda.synchronize()
            start = time.perf_counter()
            out = step(*args, **kwargs)
            if ON_GPU:
                torch.cuda.synchronize()
            steps.seconds += time.perf_counter() - start
            return out

        return run

    with ExitStack() as stack:
        for engine in (parts.policy.deepspeed, parts.critic.deepspeed):
            stack.enter_context(mock.patch.object(engine, "step", timed(engine.step)))
        yield steps


def released_experience(parts: Parts, rollout: Rollout, clock: Clock) -> list[released.Experience]:
    tokens, device = len(rollout.tokens), parts.placement.device
    with clock.phase("score", tokens):
        models_ = (parts.policy.evaluate, parts.critic.evaluate, parts.reference, parts.dpo, parts.reward_model)
        return [
            released.experience(batch, *models_, parts.config) for batch in released.micro_batches(rollout, PAD, device)
        ]


def released_forwards(parts: Parts):
    return released.padded_forwards(
        [parts.policy.model, parts.critic.model, parts.reference, parts.dpo, parts.reward_model]
    )


# The measurement


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


def rollouts(parts: Parts, engine: Any, clock: Clock, requests: list, lengths: list) -> Rollout:
    """Push, wake, generate and put to sleep, as an iteration does; the phase counts response tokens."""
    sampling = Sampling(parts.shape.response, 1.0, (STOP,))
    with clock.phase("sync", 0):
        engine.push(parts.policy.weights(), version=1)
    with clock.phase("rollout", sum(lengths)):
        engine.wake()
        rollout = engine.generate(requests, sampling, lambda *_: None)
        engine.sleep()
    return rollout


def iteration(shape: Shape, minutes: float) -> dict[str, Any]:
    """Ours with each rollout engine, the released path, the ablation; saved after each of them."""
    budget, (requests, lengths) = Minutes(minutes), draw(shape)
    record: dict[str, Any] = {
        "shape": asdict(shape), "weights": "random", "lengths": LENGTHS, "commit": commit(), "versions": versions(),
        "clocks": clocks(), "response_tokens": sum(lengths),
        "tokens": sum(lengths) + sum(len(q.prompt) for q in requests), "paths": {}, "not_run": {},
    }  # fmt: skip

    def keep() -> None:
        save(RUN, "iteration", record)

    with tempfile.TemporaryDirectory() as folder:
        parts = build(shape, Path(folder))
        engine = transformers_engine(parts, lengths)
        warm(parts, engine, requests, lengths)

        clock = Clock()
        rollout = rollouts(parts, engine, clock, requests, lengths)
        assert rollout.response_lens.tolist() == lengths
        ours(parts, rollout, clock, record, "ours", 3)
        keep()

        took = sum(p.seconds for p in clock.phases["rollout"])
        released_path(parts, engine, rollout, requests, lengths, record, budget, took)
        keep()

        for variant, switched_off in list(ABLATION.items())[1:]:
            if budget.left < 0:
                record["not_run"][variant] = "no minutes left"
                continue
            with switched_off():
                attempt(record, variant, lambda variant=variant: ours(parts, rollout, Clock(), record, variant, 3))
            keep()

        del engine
        freed()
        attempt(record, "ours, vLLM", lambda: with_vllm(parts, requests, lengths, record))
    record["comparison"] = comparison(record)
    keep()
    return record


def warm(parts: Parts, engine: Any, requests: list, lengths: list) -> None:
    """Compiles kernels and sizes workspaces on a few sequences, so that no phase pays for it."""
    few = sorted(range(len(requests)), key=lambda i: lengths[i])[:4]
    rollout = rollouts(parts, engine, Clock(), [requests[i] for i in few], [lengths[i] for i in few])
    scores, targets = score_and_targets(parts, rollout, Clock())
    our_updates(parts, rollout, scores, targets, Clock())


def attempt(record: dict, what: str, job: Callable[[], object]) -> None:
    """A path that cannot run leaves its reason and stops nothing else."""
    try:
        job()
    except Exception as problem:  # out of memory, a package that is missing, a peer's own error
        record["not_run"][what] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
    freed()


def ours(parts: Parts, rollout: Rollout, clock: Clock, record: dict, name: str, repeats: int) -> None:
    for _ in range(repeats):
        scores, targets = score_and_targets(parts, rollout, clock)
        losses = our_updates(parts, rollout, scores, targets, clock)
    far = apart(losses, record["paths"]["ours"]["losses"] if name != "ours" else losses)
    if far > ROUNDING[parts.shape.dtype]:
        raise RuntimeError(f"losses or gradient norms are {far:.2g} from ours")
    record["paths"][name] = {"sequences": len(rollout), "phases": clock.record(), "losses": losses, "apart": far}


def our_losses(parts: Parts, rollout: Rollout) -> dict[str, float]:
    scores, targets = score_and_targets(parts, rollout, Clock())
    return our_updates(parts, rollout, scores, targets, Clock())


def apart(losses: dict[str, float], others: dict[str, float]) -> float:
    """The largest difference of losses (absolute, in units of a whitened advantage) and gradient norms (relative)."""
    return max(abs(losses[k] - others[k]) / (others[k] if k.endswith("norm") else 1.0) for k in others)


def with_vllm(parts: Parts, requests: list, lengths: list, record: dict) -> None:
    """The rollout alone; the other phases are those of ours."""
    engine, clock = vllm_engine(parts), Clock()
    with vllm_lengths(requests, lengths):
        rollouts(parts, engine, Clock(), requests[:4], lengths[:4])
        rollout = rollouts(parts, engine, clock, requests, lengths)
    assert rollout.response_lens.tolist() == lengths
    record["paths"]["ours, vLLM"] = {"sequences": len(rollout), "phases": clock.record()}


def released_path(
    parts: Parts,
    engine: Any,
    rollout: Rollout,
    requests: list,
    lengths: list,
    record: dict,
    budget: Minutes,
    took: float,
) -> None:
    """The released path on the first sequences; generation last, and only where it fits."""
    count = min(parts.shape.released, len(rollout)) // released.MICRO * released.MICRO
    part, clock = rollout.select(range(count)), Clock()
    tokens = len(part.tokens)

    def score_and_train() -> None:
        with released_forwards(parts):
            for _ in range(2):
                experiences = released_experience(parts, part, clock)
                losses = released_updates(parts, experiences, tokens, clock)
        far = apart(losses, our_losses(parts, part))
        if far > ROUNDING[parts.shape.dtype]:
            raise RuntimeError(f"losses or gradient norms are {far:.2g} from ours on the same sequences")
        record["paths"]["released"] = {"sequences": count, "phases": clock.record(), "losses": losses, "apart": far}

    def generate() -> None:
        engine.wake()
        before = engine.model.config._attn_implementation
        engine.model.set_attn_implementation("sdpa")
        with clock.phase("rollout", sum(lengths[:count])):
            sampled = released.generate(engine.model, requests[:count], lengths[:count], STOP, PAD)
        engine.model.set_attn_implementation(before)
        engine.sleep()
        assert sampled == sum(lengths[:count])
        record["paths"]["released"]["phases"] = clock.record()

    attempt(record, "released", score_and_train)
    micro = count // released.MICRO
    steps = sum(max(lengths[i : i + released.MICRO]) for i in range(0, count, released.MICRO))
    predicted = took * steps / max(lengths)
    if "released" not in record["paths"]:
        return
    if predicted > budget.left:
        record["not_run"]["released rollout"] = f"{micro} micro-batches would take about {predicted:.0f} s"
        return
    attempt(record, "released rollout", generate)


def comparison(record: dict) -> dict[str, float]:
    """Tokens/s of a whole iteration, all paths brought to ours' number of sequences.

    Phases are scaled by tokens, but the optimiser's step is taken as it is: it does not grow with the batch. A path
    without its own rollout or sync takes ours'.
    """
    base = record["paths"]["ours"]["phases"]
    out = {}
    for name, path in record["paths"].items():
        phases = base | path["phases"] if name != "released" else {"sync": base["sync"]} | path["phases"]
        if "rollout" not in phases:
            continue
        total = 0.0
        for phase in ("rollout", "score", "targets", "train policy", "train critic"):
            if phase in phases:
                total += phases[phase]["seconds"] / phases[phase]["tokens"] * base[phase]["tokens"]
        step = phases["optimiser (inside train)"]["seconds"]
        total += step * (1 - base["score"]["tokens"] / phases["score"]["tokens"])
        total += phases["sync"]["seconds"]
        out[name] = record["tokens"] / total
    if "released" in out:
        best = max(rate for name, rate in out.items() if name != "released")
        out["ratio to released"] = best / out["released"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()
    if MISSING:
        sys.exit(f"not run: {MISSING}")
    print(json.dumps(iteration(SHAPES[args.shape], args.minutes), indent=1))


if __name__ == "__main__":
    main()
