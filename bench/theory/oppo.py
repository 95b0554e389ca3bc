"""Optimistic PPO on token MDPs: mirror ascent on optimistic Q tables, and its exact regret.

python -m bench.theory.oppo       # writes bench/results/theory/oppo.json and oppo.svg

OPPO of Cai, Yang, Jin and Wang (arXiv 1912.05830, Algorithm 1), with one-hot features phi of (prefix, token). In
episode k, after n visits of a pair in the episodes before,

    pi_k    proportional to pi_{k-1} * exp(alpha * Q_{k-1})              alpha = sqrt(2 log A / (H^2 K)), K episodes
    phi' w  = sum of V over the prefixes that followed / (n + ridge)     ridge regression
    Gamma   = bonus / sqrt(n + ridge)                                    bonus * sqrt(phi' Lambda^-1 phi)
    Q       = r + clip(phi' w + Gamma, 0, tokens that are left)          V(s) = sum_a pi_k(a|s) Q(s, a)

Rewards lie in [0, 1] and are known; that a token's prefix is followed by itself with the token is not. The constants of
the paper's bonus are left out: `bonus` is of the order of the horizon.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from bench.theory.figures import RESULTS, slope
from bench.theory.token_mdp import TokenMDP
from rto_fast.logs.files import write_atomic

matplotlib.use("svg")
from matplotlib import pyplot

EPISODES = (500, 1000, 2000, 4000, 8000, 16000, 32000)
Tables = list[Tensor]
"""[runs, A^h, A] for each h: one table a run."""


def random_rewards(mdp: TokenMDP, runs: int, seed: int) -> Tables:
    """Uniform numbers in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(runs, mdp.actions**h, mdp.actions) for h in range(mdp.horizon)]
    return [torch.rand(s, generator=generator, dtype=torch.float64) for s in shapes]


def values(policy: Tables, rewards: Tables) -> Tensor:
    """[runs] exact value of the policies (probabilities) at the prompt."""
    after: Tensor | float = 0.0
    for pi, r in zip(reversed(policy), reversed(rewards), strict=True):
        q = r + (after if isinstance(after, float) else after.view(r.shape))
        after = (pi * q).sum(-1)
    assert isinstance(after, Tensor)
    return after[:, 0]


def best_values(rewards: Tables) -> Tensor:
    """[runs] value of the best policy."""
    after: Tensor | float = 0.0
    for r in reversed(rewards):
        after = (r + (after if isinstance(after, float) else after.view(r.shape))).amax(-1)
    assert isinstance(after, Tensor)
    return after[:, 0]


def evaluate(policy: Tables, rewards: Tables, counts: Tables, bonus: float, ridge: float) -> Tables:
    """Optimistic Q tables of the policies (probabilities) after `counts` visits of each pair."""
    horizon, out = len(rewards), []
    after: Tensor | float = 0.0
    for h in reversed(range(horizon)):
        n = counts[h]
        following = 0.0 if isinstance(after, float) else after.view(n.shape)
        optimistic = n * following / (n + ridge) + bonus / (n + ridge).sqrt()
        q = rewards[h] + optimistic.clamp(0, horizon - 1 - h)
        out.insert(0, q)
        after = (policy[h] * q).sum(-1)
    return out


def visit(policy: Tables, counts: Tables, generator: torch.Generator) -> None:
    """Samples one response a run and counts its pairs of prefix and token."""
    runs, actions = counts[0].shape[0], counts[0].shape[2]
    every, prefix = torch.arange(runs), torch.zeros(runs, dtype=torch.int64)
    for pi, n in zip(policy, counts, strict=True):
        token = torch.multinomial(pi[every, prefix], 1, generator=generator)[:, 0]
        n[every, prefix, token] += 1
        prefix = prefix * actions + token


def regret(
    mdp: TokenMDP, rewards: Tables, episodes: Sequence[int], *, bonus: float, ridge: float = 1.0, seed: int = 0
) -> Tensor:
    """[runs] regret of each run after its `episodes`: the sum of V* - V of the policies that it played."""
    lengths = torch.tensor(episodes, dtype=torch.float64)
    alpha = (2 * math.log(mdp.actions) / (mdp.horizon**2 * lengths)).sqrt()[:, None, None]
    logits, counts, q = ([torch.zeros_like(r) for r in rewards] for _ in range(3))
    generator, best = torch.Generator().manual_seed(seed), best_values(rewards)
    total = torch.zeros(len(lengths), dtype=torch.float64)
    for k in range(max(episodes)):
        logits = [z + alpha * table for z, table in zip(logits, q, strict=True)]
        policy = [z.softmax(-1) for z in logits]
        q = evaluate(policy, rewards, counts, bonus, ridge)
        visit(policy, counts, generator)
        total += (best - values(policy, rewards)) * (k < lengths)
    return total


def curve(episodes: Sequence[int], bonus: float, seeds: int) -> dict[str, list[float]]:
    """Mean regret and its deviation over rewards, by the number of episodes; 3 actions, 3 tokens."""
    mdp = TokenMDP(actions=3, horizon=3)
    rewards = [r.repeat(len(episodes), 1, 1) for r in random_rewards(mdp, seeds, 0)]
    lengths = [k for k in episodes for _ in range(seeds)]
    found = regret(mdp, rewards, lengths, bonus=bonus).view(len(episodes), seeds)
    return {"regret": found.mean(1).tolist(), "deviation": found.std(1).tolist()}


def draw(figures: dict, path: Path) -> None:
    pyplot.rcParams.update({"svg.hashsalt": "theory", "font.size": 9, "axes.spines.top": False,
                            "axes.spines.right": False})  # fmt: skip
    figure, axis = pyplot.subplots(figsize=(4.6, 3.6), layout="constrained")
    for name in ("bonus 3", "bonus 0"):
        data = figures[name]
        axis.loglog(figures["episodes"], data["regret"], "o-", label=f"{name}, slope {data['slope']:.2f}")
    first, last = figures["episodes"][0], figures["bonus 3"]["regret"][0]
    axis.loglog(figures["episodes"], [last * (k / first) ** 0.5 for k in figures["episodes"]], ":", color="grey",
                label="slope 1/2")  # fmt: skip
    axis.set(title="Regret of optimistic PPO", xlabel="episodes", ylabel="sum of V* − V")
    axis.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of oppo.svg and oppo.json")
    parser.add_argument("--seeds", type=int, default=8, help="reward tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict = {"episodes": list(EPISODES)}
    for bonus in (3.0, 0.0):
        found = curve(EPISODES, bonus, args.seeds)
        figures[f"bonus {bonus:g}"] = found | {"slope": slope(figures["episodes"], found["regret"])}
    args.output.mkdir(parents=True, exist_ok=True)
    draw(figures, args.output / "oppo.svg")
    write_atomic(args.output / "oppo.json", json.dumps(figures, indent=1) + "\n")
    print({name: data["slope"] for name, data in figures.items() if name != "episodes"})


if __name__ == "__main__":
    main()
