"""The demo's models beside token rewards that learn: the second table of docs/results/demo.md, by one command.

    python -m bench.demo_online               # run again, it goes on where it stopped
    python -m bench.demo_online --report-only --page    # trains nothing

Each model of each seed is a cell of bench/claim, which is never trained twice. Writes OUT and, with --page, the section
of docs/results/demo.md.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a cell is too small for a second thread

from bench.claim.cells import ONLINE, Cell
from bench.claim.grid import ROOT, CellsConfig, by_flags, opened
from bench.claim.report import compact, markdown, put_between
from rto_fast.demo.config import DemoConfig
from rto_fast.errors import require
from rto_fast.logs.files import write_atomic

MARKS = ("<!-- online -->", "<!-- /online -->")
FROZEN = "RTO"
MODELS = ("SFT", "DPO", "PPO", FROZEN, *ONLINE)
NAMES = {FROZEN: "RTO, frozen"}
"""Model -> what the tables call it where that is another word."""

Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(CellsConfig):
    """The models of `make demo` and its online arms, on several seeds; all that is not named is as in the demo."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds; each is run once and reported, whatever it gives."""
    online_lr: float = 1e-4
    """Peak learning rate of the DPO model in the online arms."""

    # The demo's own sizes
    iterations: int = DemoConfig.iterations
    corpus_rows: int = DemoConfig.corpus_rows
    pairs: int = DemoConfig.pairs
    eval_prompts: int = DemoConfig.eval_prompts
    runs: str = "runs/demo_online"

    out: str = "bench/results/demo/online.json"
    """Results."""
    page: bool = False
    """Write the section of docs/results/demo.md."""

    def validate(self) -> None:
        require(bool(self.seeds), "seeds: at least one is needed")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds: one of {self.seeds} comes twice")
        require(self.online_lr > 0, f"online_lr: must be positive, got {self.online_lr}")
        super().validate()

    def cells(self) -> dict[tuple[int, str], Cell]:
        """(seed, model) -> its cell."""
        rates = {"SFT": 0.0, "DPO": DemoConfig.dpo_lr}
        change = dict.fromkeys(ONLINE, (("online_lr", self.online_lr),))
        return {
            (seed, m): Cell("demo", seed, m, rates.get(m, DemoConfig.policy_lr), change=change.get(m, ()))
            for seed in self.seeds for m in MODELS
        }  # fmt: skip


class Table:
    """What the cells found, to be asked for."""

    def __init__(self, seeds: Sequence[int], found: dict[tuple[int, str], Found]) -> None:
        """found: (seed, model) -> the result of its cell; those that were not run, or diverged, have no judgement."""
        self.seeds = seeds
        self.found = {key: result for key, result in found.items() if "judgement" in result}

    def figures(self, model: str, name: str) -> list[float]:
        """A figure of the judgements, of the seeds that have it."""
        there = [self.found[s, model] for s in self.seeds if (s, model) in self.found]
        return [result["judgement"][name] for result in there]

    def gaps(self, model: str) -> list[float]:
        """True reward less the frozen RTO's, of the seeds that have both."""
        both = [s for s in self.seeds if {(s, model), (s, FROZEN)} <= self.found.keys()]
        reward = {m: [self.found[s, m]["judgement"]["true_reward"] for s in both] for m in (model, FROZEN)}
        return [a - b for a, b in zip(reward[model], reward[FROZEN], strict=True)]

    def halves(self, model: str, seeds: Sequence[int]) -> list[tuple[float, float]]:
        """Mean accuracy of the first and of the second half of the rollouts, where both have one."""
        out = []
        for seed in seeds:
            right = self.found.get((seed, model), {}).get("curve", {}).get("accuracy", [])
            parts = [
                [r for r in part if r is not None] for part in (right[: len(right) // 2], right[len(right) // 2 :])
            ]
            out += [(mean(parts[0]), mean(parts[1]))] if all(parts) else []
        return out

    def by_model(self) -> str:
        """Markdown: a row a model, means over its seeds with their standard deviation."""
        header = ["model", "true reward", f"less {NAMES[FROZEN]}", "KL to SFT, nats", "win rate against SFT", "length",
                  "accuracy of halves", "seeds"]  # fmt: skip
        return markdown(header, [self._row(m) for m in MODELS if self.figures(m, "true_reward")])

    def _row(self, model: str) -> list[str]:
        halves = self.halves(model, self.seeds)
        accuracy = ", ".join(f"{mean(h):.2f}" for h in zip(*halves, strict=True))
        gaps = self.gaps(model) if model in ONLINE else []
        return [
            NAMES.get(model, model), spread(self.figures(model, "true_reward")), spread(gaps, "+"),
            spread([abs(kl) if abs(kl) < 0.005 else kl for kl in self.figures(model, "kl")]),
            f"{100 * mean(self.figures(model, 'win_rate')):.0f} %", f"{mean(self.figures(model, 'length')):.1f}",
            accuracy, f"{len(self.figures(model, 'true_reward'))}",
        ]  # fmt: skip

    def by_seed(self) -> str:
        """Markdown: a row a seed; an empty field has no model."""
        arms = (FROZEN, *ONLINE)
        header = ["seed", *(NAMES.get(m, m) for m in MODELS), f"KL ({', '.join(arms)})",
                  f"accuracy of halves ({', '.join(ONLINE)})"]  # fmt: skip
        return markdown(header, [
            [f"{seed}", *(self._one(seed, m, "true_reward", ".2f") for m in MODELS),
             ", ".join(self._one(seed, m, "kl", ".1f") for m in arms),
             "; ".join(", ".join(f"{h:.2f}" for h in pair) for m in ONLINE for pair in self.halves(m, (seed,)))]
            for seed in self.seeds
        ])  # fmt: skip

    def _one(self, seed: int, model: str, name: str, form: str) -> str:
        result = self.found.get((seed, model))
        return format(result["judgement"][name], form) if result else ""


def spread(values: Sequence[float], sign: str = "") -> str:
    """`1.23 ± 0.45`: mean and standard deviation; of one value itself, of none nothing."""
    if not values:
        return ""
    more = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.2f}" + more


def write(config: OnlineConfig, record: Found, table: Table) -> str:
    """Writes the record and, where it is asked for, the page; returns the tables."""
    text = f"`{record['command']}`:\n\n{table.by_model()}\n\nTrue reward, seed by seed:\n\n{table.by_seed()}"
    if record["missing"]:
        text += f"\n\n{len(record['missing'])} cells had not run."
    write_atomic(ROOT / config.out, compact(record))
    if config.page:
        put_between(ROOT / "docs" / "results" / "demo.md", MARKS, f"\n{text}\n")
    return text


def main(config: OnlineConfig) -> None:
    config.validate()
    cells = config.cells()
    with opened(config, ROOT / config.runs) as grid:
        grid.run("demo", cells.values())
    flags = [a for a in sys.argv[1:] if a not in ("--report-only", "--page")]
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("page", "report_only")}
    record = {
        "command": f"python -m bench.demo_online {shlex.join(flags)}".strip(),
        "commits": sorted({c["commit"] for c in grid.found.values()}), "settings": settings,
        "arms": ONLINE, "missing": sorted(c.name for c in grid.missing), "cells": list(grid.found.values()),
    }  # fmt: skip
    found = {key: grid.found[cell] for key, cell in cells.items() if cell in grid.found}
    print(write(config, record, Table(config.seeds, found)))


if __name__ == "__main__":
    by_flags(main, OnlineConfig, __doc__)
