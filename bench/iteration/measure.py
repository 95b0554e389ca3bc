"""One RTO iteration on one device, phase by phase: ours, ours with one thing switched off, the released data path.

    python -m bench.iteration.measure --minutes 10      writes run/iteration of bench/results/<device>.json

gpu.py goes on with what an earlier command had no minutes for: the rollout is kept in a file, and paths that are
in the results are left as they are.
Weights are random: time and memory do not depend on them, what is sampled means nothing. Response lengths are
drawn beforehand (`LENGTHS`) and forced on every engine, so that all of them sample the same number of tokens.
The released path (released.py) runs on the first sequences only, and samples the first micro-batch of 4, since its
cost is the same for every one; rates are per token of prompt and response, and the optimiser's step stands apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.harness import ON_GPU, RUN, UNFINISHED, clocks, commit, resumed, save, versions
from bench.iteration.workload import (
    LENGTHS,
    MISSING,
    PAD,
    SHAPES,
    STOP,
    Clock,
    Minutes,
    Parts,
    Phase,
    Shape,
    attempt,
    build,
    draw,
    transformers_engine,
)  # fmt: skip

if not MISSING:
    from bench.iteration import released
    from bench.iteration.ablation import ABLATION
    from rto_fast.contract import ResponseTexts, Rollout, Scores, Targets
    from rto_fast.rollout.engine import Sampling
    from rto_fast.scoring.score import score_rollout
    from rto_fast.trainer import compute_targets
    from rto_fast.updates.ppo import TrainBatch

# How far another path's losses and gradient norms may be from ours: no figure for one that computes something else.
ROUNDING = {"fp32": 1e-3, "bf16": 0.2}


# Phases


def texts_of(rollout: Rollout) -> ResponseTexts:
    return ResponseTexts([""] * len(rollout), [""] * len(rollout), [[]] * len(rollout))


def score_and_targets(parts: Parts, rollout: Rollout, clock: Clock) -> tuple[Scores, Targets]:
    tokens = len(rollout.tokens)
    with clock.phase("score", tokens):
        scores, _ = score_rollout(
            rollout, texts_of(rollout), parts.scorers, parts.config, parts.placement, lambda _: None
        )
    with clock.phase("targets", len(scores.values)):
        targets = compute_targets(rollout, scores, parts.config, parts.config.beta2)
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


LATE = "no minutes left"


def new_record(shape: Shape, requests: list, lengths: list) -> dict[str, Any]:
    return {
        "shape": asdict(shape), "weights": "random", "lengths": LENGTHS, "commit": commit(), "versions": versions(),
        "clocks": clocks(), "response_tokens": sum(lengths),
        "tokens": sum(lengths) + sum(len(q.prompt) for q in requests), "paths": {}, "not_run": {},
    }  # fmt: skip


def iteration(shape: Shape, minutes: float, kept: Path | None = None) -> dict[str, Any]:
    """Ours, the ablation and the released path; saved after each of them.

    `kept` is a file for the rollout: with it and a record of an earlier command only what that lacks is run.
    """
    budget, (requests, lengths) = Minutes(minutes), draw(shape)
    before = resumed("iteration") if kept and kept.exists() else {}
    record = before if before.get("shape") == json.loads(json.dumps(asdict(shape))) else {}
    record = record or new_record(shape, requests, lengths)
    record["not_run"] = {k: v for k, v in record["not_run"].items() if not v.startswith(LATE)}

    def keep() -> None:
        save(RUN, "iteration", record)

    def wanted(path: str) -> bool:
        """Whether the path is still to be run; says so in the record where there are no minutes for it."""
        if path in record["paths"] or path in record["not_run"]:
            return False
        if budget.left < 0:
            record["not_run"][path] = LATE
        return budget.left >= 0

    with tempfile.TemporaryDirectory() as folder:
        parts = build(shape, Path(folder))
        engine = transformers_engine(parts, lengths)
        warm(parts, engine, requests, lengths)
        clock = Clock()
        if "ours" in record["paths"]:
            rollout = torch.load(kept, weights_only=False)
        else:
            rollout = rollouts(parts, engine, clock, requests, lengths)
            assert rollout.response_lens.tolist() == lengths
            if kept:
                torch.save(rollout, kept)
            ours(parts, rollout, clock, record, "ours", 3)
            keep()
        for variant, switched_off in list(ABLATION.items())[1:]:
            if wanted(variant):
                with switched_off():
                    attempt(record, variant, lambda v=variant: ours(parts, rollout, Clock(), record, v, 3))
            keep()
        if wanted("released"):
            attempt(record, "released", lambda: released_score_and_train(parts, rollout, record))
            keep()
        released = record["paths"].get("released")
        if released and "rollout" not in released["phases"]:
            released_rollout(parts, engine, requests, lengths, record, budget)
    record["comparison"] = comparison(record)
    keep()
    return record


def warm(parts: Parts, engine: Any, requests: list, lengths: list) -> None:
    """Compiles kernels and sizes workspaces on a few sequences, so that no phase pays for it."""
    few = sorted(range(len(requests)), key=lambda i: lengths[i])[:4]
    rollout = rollouts(parts, engine, Clock(), [requests[i] for i in few], [lengths[i] for i in few])
    scores, targets = score_and_targets(parts, rollout, Clock())
    our_updates(parts, rollout, scores, targets, Clock())


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


def released_score_and_train(parts: Parts, rollout: Rollout, record: dict) -> None:
    """The released path's scoring and updates of the first sequences, and ours beside it."""
    count = min(parts.shape.released, len(rollout)) // released.MICRO * released.MICRO
    part, clock = rollout.select(range(count)), Clock()
    with released_forwards(parts):
        for _ in range(2):
            experiences = released_experience(parts, part, clock)
            losses = released_updates(parts, experiences, len(part.tokens), clock)
    far = apart(losses, our_losses(parts, part))
    if far > ROUNDING[parts.shape.dtype]:
        raise RuntimeError(f"losses or gradient norms are {far:.2g} from ours on the same sequences")
    record["paths"]["released"] = {"sequences": count, "phases": clock.record(), "losses": losses, "apart": far}


def released_rollout(parts: Parts, engine: Any, requests: list, lengths: list, record: dict, budget: Minutes) -> None:
    """The released path's sampling of one micro-batch, where it fits: a step of it takes as long as one of ours."""
    count, clock = released.MICRO, Clock()
    requests, lengths = requests[:count], lengths[:count]
    took = record["paths"]["ours"]["phases"]["rollout"]["seconds"]
    predicted = took * max(lengths) / parts.shape.response
    if predicted > budget.left:
        record["not_run"]["released rollout"] = f"{LATE}: {count} sequences would take about {predicted:.0f} s"
        return

    def generate() -> None:
        engine.wake()
        before = engine.model.config._attn_implementation
        engine.model.set_attn_implementation("sdpa")
        with clock.phase("rollout", sum(lengths)):
            sampled = released.generate(engine.model, requests, lengths, STOP, PAD)
        engine.model.set_attn_implementation(before)
        engine.sleep()
        assert sampled == sum(lengths)
        record["paths"]["released"]["phases"] |= clock.record()

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
    parser.add_argument("--rollout", type=Path, help="file that keeps the rollout for the command that goes on")
    args = parser.parse_args()
    if MISSING:
        sys.exit(f"not run: {MISSING}")
    record = iteration(SHAPES[args.shape], args.minutes, args.rollout)
    print(json.dumps(record, indent=1))
    if any(why.startswith(LATE) for why in record["not_run"].values()):
        sys.exit(UNFINISHED)


if __name__ == "__main__":
    main()
