"""Designs A, B and C: what is trained, and how learning rates are chosen. docs/results/protocol.md says why.

A   rewards at equal KL: five methods, each at several penalties beta2, on fresh seeds
B   efficiency: PPO and RTO with budgets of samples, the rate tuned for each method and budget
C   A's differences with one part of the training changed (ablations.py), on the main task
D   a row for each later variant (systems.py), there too

A learning rate is chosen by what a user has: the best reward-model score among rates whose KL is within a bound. The
rate that the true reward would choose stands beside it and decides nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from bench.claim import ablations, other_tasks, stories
from bench.claim.ablations import Ablation
from bench.claim.cells import MORE, RL, TWO_RMS, Cell, oracle_cell
from bench.claim.estimates import Points, at_kl
from bench.claim.grid import CellsConfig, Grid
from bench.claim.systems import SYSTEMS, UNTUNED, System
from rto_fast.errors import require

DESIGNS = ("A", "B", "C", "D")
MAIN = "medium"
TASKS = (MAIN, *other_tasks.TASKS, *stories.TASKS)
METHODS = ("PPO", "RTO", "DDPO", "RS-PPO", TWO_RMS)
FEW_METHODS = ("PPO", "RTO", "DDPO")
"""Of the tasks whose runs take longest: `long` and the stories."""
BUDGETED = ("PPO", "RTO")
KL_SCALE = {"long": 5.0, **dict.fromkeys(stories.TASKS, 3.0)}
"""By how much longer a task's responses are than medium's; its KL levels, range and bound are multiplied by it."""
CENTRE = 0.05
"""beta2 of tuning and of design B."""
HELD = 0.1
"""beta2 of design B's second RTO: between it and CENTRE lies PPO's KL."""
HALVINGS = 2
"""How often, on a task in small, a method that stays too near gets half its weakest penalty."""
ROLLOUT = 64
"""Responses a rollout."""


@dataclass(frozen=True, kw_only=True)
class DesignConfig(CellsConfig):
    """Designs A to D of the claim: all cells, tables, figures and JSON."""

    designs: tuple[str, ...] = DESIGNS
    """Which to run."""
    tasks: tuple[str, ...] = (MAIN, "whole", "long", "stories-rule")
    """medium in full; whole, long, stories-rule and stories-taste in small."""
    seeds: tuple[int, ...] = tuple(range(200, 212))
    """Seeds of design A, in no run before."""
    budget_seeds: tuple[int, ...] = tuple(range(200, 208))
    """Seeds of design B."""
    tuning_seeds: tuple[int, ...] = (100, 101, 102, 103)
    """Seeds that choose the learning rates of design A; never reported."""
    budget_tuning_seeds: tuple[int, ...] = (100, 101)
    """Those of design B."""
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    """Policy's peak learning rates; where the chosen one is at an edge, one step more is tried."""
    story_learning_rates: tuple[float, ...] = (3e-4, 5e-4, 1e-3)
    """The same on the stories, where the model is pretrained."""
    kl_bound: float = 10.0
    """KL (nats a response) that a chosen rate stays within on the tuning seeds."""
    beta2: tuple[float, ...] = (0.0125, 0.025, 0.05, 0.1, 0.2)
    """Penalties of PPO and RTO."""
    few_beta2: tuple[float, ...] = (0.025, 0.05, 0.1)
    """Penalties of the other methods, and of all of them in small."""
    budgets: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    """Samples of design B's runs, multiples of 64."""
    kl_levels: tuple[float, ...] = (4.0, 6.0, 8.0, 10.0)
    """KL (nats) at which rewards are compared."""
    kl_range: tuple[float, float] = (3.0, 10.0)
    """KL over which the difference is averaged."""
    least: float = 0.5
    """Share of that range that both methods must reach for a seed to count."""
    shares: tuple[float, ...] = (0.5, 0.75, 0.95)
    """Levels of design B, of PPO's plateau."""
    draws: int = 2000
    """Bootstrap samples of the seeds."""

    # Designs C and D, on medium
    ablation_seeds: tuple[int, ...] = (200, 201, 202, 203)
    """Their seeds."""
    ablation_beta2: tuple[float, ...] = (0.025, 0.05)
    """Design C's penalties; D's is 0.05."""
    value_samples: int = 2
    """Continuations of each token that give the oracle critic's values."""

    # In small: the tasks beside medium
    small_seeds: int = 4
    """Seeds, the first of `seeds`."""
    small_tuning_seeds: int = 2
    """Tuning seeds, the first of `tuning_seeds`."""
    small_budgets: tuple[int, ...] = (512, 1024, 2048)
    """Budgets."""

    oracle_samples: tuple[int, int] = (32, 512)
    """Of the tilting oracle: evaluation prompts, and responses to each of the SFT and of the DPO model."""

    runs: str = "runs/claim_designs"
    out: str = "bench/results/claim/designs"
    """Folder of designs.json, tables.md and the figures."""
    page: bool = False
    """Write docs/results/designs.md."""

    def validate(self) -> None:
        super().validate()
        for name, known in (("designs", DESIGNS), ("tasks", TASKS)):
            wrong = [v for v in getattr(self, name) if v not in known]
            require(not wrong, f"{name}: unknown {', '.join(wrong)}; choose from {', '.join(known)}")
            require(bool(getattr(self, name)), f"{name}: at least one is needed")
        for name in ("learning_rates", "beta2", "few_beta2", "ablation_beta2", "budgets", "small_budgets",
                     "story_learning_rates"):  # fmt: skip
            values = getattr(self, name)
            require(bool(values) and min(values) > 0, f"{name}: positive numbers are needed, got {values}")
        for name in ("beta2", "few_beta2"):
            require(CENTRE in getattr(self, name), f"{name}: {CENTRE:g}, where rates are tuned, must be among them")
        require(min(self.oracle_samples) > 0, f"oracle_samples: must be positive, got {self.oracle_samples}")
        require(self.value_samples >= 1, f"value_samples: must be at least 1, got {self.value_samples}")
        for name in ("seeds", "budget_seeds", "ablation_seeds", "tuning_seeds", "budget_tuning_seeds"):
            require(bool(getattr(self, name)), f"{name}: at least one is needed")
        shared = {*self.tuning_seeds, *self.budget_tuning_seeds} & {
            *self.seeds,
            *self.budget_seeds,
            *self.ablation_seeds,
        }
        require(not shared, f"tuning_seeds: {sorted(shared)} are reported too; the report would be of tuned seeds")
        for name in ("budgets", "small_budgets"):
            wrong = [n for n in getattr(self, name) if n % ROLLOUT]
            require(not wrong, f"{name}: {wrong} are no multiples of a rollout's {ROLLOUT} responses")
        require(0 <= self.kl_range[0] < self.kl_range[1], f"kl_range: the lower end first, got {self.kl_range}")

    def scale(self, task: str) -> Scale:
        """How much of the designs a task gets."""
        if task == MAIN:
            return Scale(self.seeds, self.budget_seeds, self.tuning_seeds, self.budget_tuning_seeds, self.beta2,
                         self.few_beta2, self.budgets, self.learning_rates, METHODS, 1.0)  # fmt: skip
        seeds, tuning = self.seeds[: self.small_seeds], self.tuning_seeds[: self.small_tuning_seeds]
        rates = self.story_learning_rates if task in stories.TASKS else self.learning_rates
        return Scale(seeds, seeds, tuning, tuning, self.few_beta2, self.few_beta2, self.small_budgets, rates,
                     FEW_METHODS if task in KL_SCALE else METHODS, KL_SCALE.get(task, 1.0))  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """The designs' sizes on one task."""

    seeds: tuple[int, ...]
    budget_seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    budget_tuning_seeds: tuple[int, ...]
    beta2: tuple[float, ...]
    """Of PPO and RTO."""
    few_beta2: tuple[float, ...]
    """Of the others."""
    budgets: tuple[int, ...]
    rates: tuple[float, ...]
    methods: tuple[str, ...]
    """Of design A."""
    kl: float
    """What the config's KLs are multiplied by."""

    def penalties(self, method: str) -> tuple[float, ...]:
        return self.beta2 if method in BUDGETED else self.few_beta2


@dataclass(frozen=True)
class Choice:
    """The learning rate of a method, at one number of rollouts."""

    task: str
    method: str
    iterations: int
    rate: float
    """By the reward model's score within the KL bound: what is run."""
    truth_rate: float
    """By the true reward: what nobody could have chosen."""
    tried: dict[float, dict[str, float]] = field(default_factory=dict)
    """Rate -> means over the tuning seeds: score, kl (both of the last rollouts) and reward (true)."""


Found = dict[Cell, dict[str, Any]]


class Design:
    """Runs the cells of both designs on one task, and hands out what they found."""

    def __init__(self, config: DesignConfig, grid: Grid, task: str) -> None:
        self.config, self.grid, self.task, self.scale = config, grid, task, config.scale(task)
        self.choices: dict[tuple[str, str, int], Choice] = {}
        """(design, method, rollouts) -> its rate."""
        self.weaker: dict[str, tuple[float, ...]] = {}
        """Method -> penalties below the scale's, weakest first, where it stays too near."""

    def cell(self, seed: int, method: str, rate: float, beta2: float, iterations: int) -> Cell:
        """A's and B's cells are the same where their settings are."""
        change: tuple[tuple[str, Any], ...] = (("beta2", beta2),)
        if iterations != self.config.iterations:
            change += (("iterations", iterations),)
        return Cell(self.task, seed, method, rate, change=change)

    def choose(self, design: str, methods: Iterable[str], iterations: Sequence[int], seeds: Sequence[int]) -> None:
        """Tunes the rate of each method at each number of rollouts, one step beyond the grid where its edge is best; a
        single rate is taken as it is."""
        wanted = [(m, n) for m in methods for n in iterations]
        tried = {key: sorted(self.scale.rates) for key in wanted}
        for _ in range(2):
            self.grid.run(f"tuning on {self.task}", longest_first(
                self.cell(s, m, r, CENTRE, n) for (m, n), rates in tried.items() for r in rates for s in seeds
            ))  # fmt: skip
            for (m, n), rates in tried.items():
                choice = self.choices[design, m, n] = self._choice(m, n, rates, seeds)
                several = len(self.scale.rates) > 1
                lowest, highest = (several and edge == choice.rate for edge in (rates[0], rates[-1]))
                tried[m, n] = [rates[0] / 2] * lowest + rates + [rates[-1] * 2] * highest

    def _choice(self, method: str, iterations: int, rates: Sequence[float], seeds: Sequence[int]) -> Choice:
        means = {}
        for rate in rates:
            found = [self.grid.found.get(self.cell(s, method, rate, CENTRE, iterations), {}) for s in seeds]
            means[rate] = last_figures(found)
        return Choice(self.task, method, iterations, best_within(means, self.config.kl_bound * self.scale.kl),
                      max(means, key=lambda r: means[r]["reward"]), means)  # fmt: skip

    def run(self) -> None:
        """Everything of this task that is not there yet."""
        if "A" in self.config.designs:
            self.choose("A", self.scale.methods, (self.config.iterations,), self.scale.tuning_seeds)
            self.run_matched()
            self.grid.run(f"oracle on {self.task}", [self.oracle(s) for s in self.scale.seeds])
        if "B" in self.config.designs:
            self.choose("B", BUDGETED, self.rollouts(), self.scale.budget_tuning_seeds)
            arms = [*((m, CENTRE) for m in BUDGETED), ("RTO", HELD)]
            self.grid.run(f"B on {self.task}", longest_first(
                self.budget_cell(s, m, beta2, n) for s in self.scale.budget_seeds for m, beta2 in arms
                for n in self.rollouts()
            ))  # fmt: skip

        if self.task == MAIN and {"C", "D"} & {*self.config.designs}:
            if "A" not in self.config.designs:
                self.choose("A", ablations.METHODS, (self.config.iterations,), self.scale.tuning_seeds)
            self.run_variants()

    def run_matched(self) -> None:
        """Design A's runs; in small, half the weakest penalty and half of that where a method stays too near."""
        for step in range(HALVINGS + 1):
            self.grid.run(f"A on {self.task}", [
                self.matched_cell(s, m, beta2) for s in self.scale.seeds for m in self.scale.methods
                for beta2 in self.penalties(m)
            ])  # fmt: skip
            near = [m for m in self.scale.methods if self.stays_near(m)] if self.task != MAIN else []
            if not near or step == HALVINGS:
                return
            for method in near:
                self.weaker[method] = (min(self.penalties(method)) / 2, *self.weaker.get(method, ()))

    def stays_near(self, method: str) -> bool:
        """Whether fewer than three of four seeds reach so far into the range of KLs that they count."""
        low, high = self.kl_range
        cells = {s: [self.matched_cell(s, method, b) for b in self.penalties(method)] for s in self.scale.seeds}
        if any(c not in self.grid.found for of_seed in cells.values() for c in of_seed):
            return False  # not all is there to say so
        furthest = [max((p[0] for c in of_seed if (p := self.judged(c))), default=0.0) for of_seed in cells.values()]
        return sum(kl >= low + self.config.least * (high - low) for kl in furthest) < 0.75 * len(furthest)

    def penalties(self, method: str) -> tuple[float, ...]:
        """Design A's beta2 of a method, weakest first."""
        return self.weaker.get(method, ()) + self.scale.penalties(method)

    def run_variants(self) -> None:
        """Designs C and D, at design A's rates."""
        if self.ablations:
            cells = [
                self.ablated_cell(a, s, m, beta2) for a in self.ablations for s in self.config.ablation_seeds
                for m in ablations.METHODS for beta2 in self.config.ablation_beta2
            ]  # fmt: skip
            self.grid.run(f"C on {self.task}: other models", ablations.worlds(cells))
            self.grid.run(f"C on {self.task}", cells)
        if self.systems:
            seeds = self.config.ablation_seeds
            self.grid.run(f"D on {self.task}: more models", [Cell(self.task, s, MORE) for s in seeds])
            self.grid.run(f"D on {self.task}", [self.system_cell(system, s) for system in self.systems for s in seeds])

    @property
    def systems(self) -> tuple[System, ...]:
        """Design D's rows, on the main task alone."""
        return SYSTEMS if "D" in self.config.designs and self.task == MAIN else ()

    @property
    def ablations(self) -> tuple[Ablation, ...]:
        """Design C's, on the main task alone."""
        asked = "C" in self.config.designs and self.task == MAIN
        return ablations.ablations(self.config.value_samples) if asked else ()

    def rollouts(self) -> list[int]:
        return [n // ROLLOUT for n in self.scale.budgets]

    def oracle(self, seed: int) -> Cell:
        return oracle_cell(self.task, seed, *self.config.oracle_samples)

    def matched_cell(self, seed: int, method: str, beta2: float) -> Cell:
        rate = self.choices["A", method, self.config.iterations].rate
        return self.cell(seed, method, rate, beta2, self.config.iterations)

    def budget_cell(self, seed: int, method: str, beta2: float, iterations: int) -> Cell:
        return self.cell(seed, method, self.choices["B", method, iterations].rate, beta2, iterations)

    def ablated_cell(self, ablation: Ablation, seed: int, method: str, beta2: float) -> Cell:
        cell = self.matched_cell(seed, method, beta2)
        return dataclasses.replace(cell, change=cell.change + ablation.changed(method))

    def system_cell(self, system: System, seed: int) -> Cell:
        if system.method not in UNTUNED:
            cell = self.matched_cell(seed, system.method, CENTRE)
            return dataclasses.replace(cell, change=cell.change + system.change)
        penalty: tuple[tuple[str, Any], ...] = (("beta2", CENTRE),) if system.method in RL else ()
        return Cell(self.task, seed, system.method, UNTUNED[system.method], change=penalty + system.change)

    # What was found

    @property
    def kl_levels(self) -> tuple[float, ...]:
        return tuple(kl * self.scale.kl for kl in self.config.kl_levels)

    @property
    def kl_range(self) -> tuple[float, float]:
        low, high = self.config.kl_range
        return low * self.scale.kl, high * self.scale.kl

    def judged(self, cell: Cell) -> tuple[float, float] | None:
        """(KL, true reward), None where the run diverged or was not done."""
        found = self.grid.found.get(cell, {}).get("judgement")
        return (found["kl"], found["true_reward"]) if found else None

    def matched(self, method: str) -> dict[int, Points]:
        """Design A: seed -> (KL, true reward) of the SFT model and of the method at each penalty."""
        return self._points(self.scale.seeds, lambda seed: [
            self.matched_cell(seed, method, b) for b in self.penalties(method)
        ])  # fmt: skip

    def ablated(self, ablation: Ablation, method: str) -> dict[int, Points]:
        """Design C: the same, with a part of the training changed."""
        return self._points(self.config.ablation_seeds, lambda seed: [
            self.ablated_cell(ablation, seed, method, b) for b in self.config.ablation_beta2
        ])  # fmt: skip

    def _points(self, seeds: Sequence[int], cells: Callable[[int], list[Cell]]) -> dict[int, Points]:
        points = {}
        for seed in seeds:
            there = [p for c in cells(seed) if (p := self.judged(c))]
            if there and (start := self.judged(Cell(self.task, seed))):
                points[seed] = [(0.0, start[1]), *there]
        return points

    def curves(self, held: bool = False) -> tuple[list[Points], list[Points]]:
        """Design B: (PPO's, RTO's) curves of (samples, true reward), of the seeds where all is there.

        held: RTO's reward is the one at PPO's KL on the same seed and budget, between its models at CENTRE and HELD;
        where PPO is further than both, its own furthest.
        """
        ppo, rto = [], []
        for seed in self.scale.budget_seeds:
            pair = self._curve(seed, held)
            if pair:
                ppo.append(pair[0])
                rto.append(pair[1])
        return ppo, rto

    def _curve(self, seed: int, held: bool) -> tuple[Points, Points] | None:
        start = self.judged(Cell(self.task, seed))
        if start is None:
            return None
        theirs, ours = [(0.0, start[1])], [(0.0, start[1])]
        for n in self.rollouts():
            ppo = self.judged(self.budget_cell(seed, "PPO", CENTRE, n))
            rto = [self.judged(self.budget_cell(seed, "RTO", b, n)) for b in ((CENTRE, HELD) if held else (CENTRE,))]
            there = [p for p in rto if p]
            if ppo is None or len(there) < len(rto):
                return None
            theirs.append((n * ROLLOUT, ppo[1]))
            ours.append((n * ROLLOUT, rewards_at(ppo[0], [(0.0, start[1]), *there]) if held else there[0][1]))
        return theirs, ours


def longest_first(cells: Iterable[Cell]) -> list[Cell]:
    """The order in which few processes are soonest through."""
    return sorted(cells, key=lambda c: -dict(c.change).get("iterations", 0))


def rewards_at(kl: float, points: Points) -> float:
    """The reward at a KL, or the one of the furthest point where that is nearer."""
    return at_kl(points, min(max(kl, 0.0), max(x for x, _ in points)))


def last_figures(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over cells of one rate: `score` and `kl` of the last eighth of the rollouts, which a user has, and the true
    `reward` of the end, which nobody has. A rate at which one diverged, or was not run, has the lowest score."""
    rows = []
    for cell in found:
        if "judgement" not in cell:
            return {"score": -math.inf, "kl": math.inf, "reward": -math.inf}
        last = max(1, len(cell["curve"]["score"]) // 8)
        rows.append({k: mean(cell["curve"][k][-last:]) for k in ("score", "kl")}
                    | {"reward": cell["judgement"]["true_reward"]})  # fmt: skip
    return {k: mean(r[k] for r in rows) for k in rows[0]}


def best_within(means: dict[float, dict[str, float]], bound: float) -> float:
    """The rate with the best score whose KL is within the bound; the one with the smallest KL where none is."""
    within = [r for r, m in means.items() if m["kl"] <= bound]
    return max(within, key=lambda r: means[r]["score"]) if within else min(means, key=lambda r: means[r]["kl"])


def as_json(choice: Choice) -> dict[str, Any]:
    return dataclasses.asdict(choice) | {"tried": [{"rate": r} | m for r, m in choice.tried.items()]}
