"""Figure of the paper's claims on token MDPs that can be enumerated; writes results/theory/theory.svg and theory.json.

python -m bench.theory.figures
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import matplotlib
import torch

from bench.theory import token_mdp
from bench.theory.token_mdp import Coefficients, TokenMDP
from rto_fast.logs.files import write_atomic

matplotlib.use("svg")
from matplotlib import pyplot

RESULTS = Path(__file__).parents[1] / "results" / "theory"
SIZES = (500, 1000, 2000, 4000, 8000, 16000, 32000, 64000, 128000)


def convergence(steps: int = 40) -> dict[str, list[float]]:
    """Largest |log pi - log of RTO's closed form| over all responses, after each step; nats."""
    mdp = TokenMDP(actions=3, horizon=4)
    ref, dpo = (mdp.policy(mdp.random_tables(seed)) for seed in (0, 1))
    score = torch.randn(81, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    c = Coefficients(beta1=0.3, beta2=0.5, beta3=0.8)
    base, learnt = mdp.along(ref).sum(1), mdp.along(dpo).sum(1)
    goal = (base + c.beta1 / c.beta2 * (learnt - base) + c.beta3 / c.beta2 * score).log_softmax(0)
    names = {"token": "RTO", "sentence": "Semi-RTO", "response": "DDPO", "shaped": "RS-PPO"}
    out = {}
    for credit, name in names.items():
        policies = (token_mdp.optimise(mdp, ref, dpo, score, c, credit, steps=n) for n in range(steps + 1))
        out[name] = [float((mdp.along(p).sum(1) - goal).abs().max()) for p in policies]
    return out


def recovery(seeds: int) -> dict[str, list[float]]:
    """Error of DPO's token reward against preferences: {"pairs", "error"}; reward units."""
    mdp, beta = TokenMDP(actions=3, horizon=2), 0.5
    ref, reward = mdp.policy(mdp.random_tables(0, scale=0.5)), mdp.random_tables(1, scale=0.7)
    truth, errors = token_mdp.shaped_reward(mdp, ref, reward, beta), []
    for pairs in SIZES:
        squares = []
        for seed in range(seeds):
            dpo = token_mdp.fit_dpo(mdp, ref, token_mdp.sample_preferences(mdp, ref, reward, pairs, seed), beta)
            found = [beta * (d - r) for d, r in zip(dpo, ref, strict=True)]
            squares.append(token_mdp.reward_error(mdp, ref, found, truth) ** 2)
        errors.append(math.sqrt(sum(squares) / seeds))
    return {"pairs": [float(n) for n in SIZES], "error": errors}


def slope(x: list[float], y: list[float]) -> float:
    """Of log y against log x, by least squares."""
    lx, ly = [math.log(v) for v in x], [math.log(v) for v in y]
    mx, my = sum(lx) / len(lx), sum(ly) / len(ly)
    return sum((a - mx) * (b - my) for a, b in zip(lx, ly, strict=True)) / sum((a - mx) ** 2 for a in lx)


def queries(trials: int) -> dict[str, list[float]]:
    """Mean queries until the best response is known, 3 actions, by horizon."""
    horizons = (2, 4, 6, 8, 10)
    out: dict[str, list[float]] = {"horizon": [float(h) for h in horizons]}
    for delay in (0, 1, 3):
        out[f"token rewards, delay {delay}"] = [token_mdp.mean_queries(3, h, delay, trials, 0)[0] for h in horizons]
    out["whole responses"] = [token_mdp.mean_queries(3, h, 0, trials, 0)[1] for h in horizons]
    return out


def draw(figures: dict, path: Path) -> None:
    pyplot.rcParams.update({"svg.hashsalt": "theory", "font.size": 9, "axes.spines.top": False,
                            "axes.spines.right": False})  # fmt: skip
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for name, values in figures["convergence"].items():
        left.semilogy([max(v, 1e-16) for v in values], label=name, linestyle="--" if name == "RS-PPO" else "-")
    left.set(title="Distance from RTO's closed form", xlabel="natural-gradient steps", ylabel="nats, largest response")
    left.legend()
    data = figures["recovery"]
    middle.loglog(data["pairs"], data["error"], "o-", label=f"measured, slope {figures['slope']:.2f}")
    guide = [data["error"][-1] * (n / data["pairs"][-1]) ** -0.5 for n in data["pairs"]]
    middle.loglog(data["pairs"], guide, ":", color="grey", label="slope −1/2")
    middle.set(
        title="DPO's token reward against the truth", xlabel="preference pairs", ylabel="RMS error, reward units"
    )
    middle.legend()
    data = figures["queries"]
    for name in data:
        if name != "horizon":
            right.semilogy(data["horizon"], data[name], "o-", label=name)
    right.set(title="Queries to find the best response", xlabel="tokens of a response", ylabel="mean queries")
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of theory.svg and theory.json")
    parser.add_argument("--seeds", type=int, default=30, help="data sets a size, of DPO's recovery")
    args = parser.parse_args()
    figures = {"convergence": convergence(), "recovery": recovery(args.seeds), "queries": queries(1000)}
    figures["slope"] = slope(figures["recovery"]["pairs"], figures["recovery"]["error"])
    draw(figures, args.output / "theory.svg")
    write_atomic(args.output / "theory.json", json.dumps(figures, indent=1) + "\n")
    print(f"{args.output / 'theory.svg'}: slope {figures['slope']:.3f}")


if __name__ == "__main__":
    main()
