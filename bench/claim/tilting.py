"""The best that a KL penalty allows, without any RL: the SFT model's distribution tilted by a reward.

    max over pi of E[r] - beta2 KL(pi || pi_sft)   is reached by   pi*(y|x) = pi_sft(y|x) exp(r(x, y) / beta2) / Z(x)

Its true reward and its KL are estimated prompt by prompt from samples of the SFT model and of the DPO model together,
weighted by pi_sft / (the mean of both) * exp(r / beta2), normalised (Veach and Guibas 1995, the balance heuristic).
Such estimates are biased by about 1 / the effective sample size: a line ends where that falls below MIN_ESS.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rto_fast.contract import Rollout

KL = (0.25, *(i / 2 for i in range(1, 25)))
"""Where lines are given, nats."""
MIN_ESS = 10.0
"""Effective samples a prompt, the mean over prompts, that a point needs."""
REWARDS = ("rm", "rm + dpo", "truth")
"""What is tilted by: PPO's reward, RTO's in sum (each token's clipped), and what both are judged by."""


class Source(Protocol):
    """Where samples come from."""

    def respond(self, model: str, prompts: int, each: int, run_seed: int) -> Rollout:
        """`each` responses of "sft" or "dpo" to each of the first evaluation prompts, prompt by prompt."""

    def opinions(self, rollout: Rollout) -> dict[str, Tensor]:
        """[B] of each response: log-probs sft_logp and dpo_logp; rewards rm and dpo, as RTO pays them; truth."""


@dataclass(frozen=True)
class Samples:
    """K responses to each of P prompts, and what is thought of them; all [P, K], fp64."""

    log_base: Tensor
    """log(pi_sft / density that the responses were drawn from)."""
    rewards: dict[str, Tensor]
    """Of REWARDS; "truth" is among them."""


@dataclass(frozen=True)
class Point:
    """A tilted model."""

    kl: float
    """Mean KL to the SFT model of a prompt, nats."""
    true_reward: float
    reward: float
    """What it is tilted by."""
    beta2: float
    ess: float
    """Effective samples a prompt, the mean over prompts."""


def tilt(log_base: Tensor, reward: Tensor, truth: Tensor, beta2: float) -> Point:
    """The estimate at one beta2. All [P, K]; a weight is exp(log_base + reward / beta2), normalised over K."""
    base = torch.log_softmax(log_base, dim=1)
    log_weights = torch.log_softmax(base + reward / beta2, dim=1)
    weights = log_weights.exp()
    return Point(
        kl=float((weights * (log_weights - base)).sum(1).mean()), true_reward=float((weights * truth).sum(1).mean()),
        reward=float((weights * reward).sum(1).mean()), beta2=beta2, ess=float((1 / weights.square().sum(1)).mean()),
    )  # fmt: skip


def at_kl(log_base: Tensor, reward: Tensor, truth: Tensor, kl: float) -> Point:
    """The tilted model at a KL (nats), by bisection of log beta2: the KL falls as beta2 rises."""
    scale = float(reward.std(dim=1).mean()) or 1.0
    low, high = math.log(1e-4 * scale), math.log(1e4 * scale)
    for _ in range(60):
        middle = (low + high) / 2
        if tilt(log_base, reward, truth, math.exp(middle)).kl > kl:
            low = middle
        else:
            high = middle
    return tilt(log_base, reward, truth, math.exp(high))


def line(samples: Samples, name: str, grid: Sequence[float] = KL) -> list[Point]:
    """The points of a reward's line that have MIN_ESS effective samples, the SFT model's own first."""
    reward, truth = samples.rewards[name], samples.rewards["truth"]
    points = [tilt(samples.log_base, reward, truth, math.inf)]
    for kl in grid:
        point = at_kl(samples.log_base, reward, truth, kl)
        if point.ess < MIN_ESS or point.kl < 0.99 * kl:
            break
        points.append(point)
    return points


def draw_samples(source: Source, prompts: int, each: int) -> Samples:
    """`each` responses of the SFT model and as many of the DPO model to each of `prompts` evaluation prompts."""
    found = [source.opinions(source.respond(model, prompts, each, run_seed=5)) for model in ("sft", "dpo")]
    columns = {k: torch.cat([f[k].double().view(prompts, each) for f in found], dim=1) for k in found[0]}
    mixture = torch.logaddexp(columns["sft_logp"], columns["dpo_logp"]) - math.log(2)
    rewards = {"rm": columns["rm"], "rm + dpo": columns["rm"] + columns["dpo"], "truth": columns["truth"]}
    return Samples(columns["sft_logp"] - mixture, rewards)


def lines(source: Source, prompts: int, each: int) -> dict[str, list[dict[str, float]]]:
    """Every reward's line, as JSON."""
    samples = draw_samples(source, prompts, each)
    return {name: [dataclasses.asdict(p) for p in line(samples, name)] for name in REWARDS}
