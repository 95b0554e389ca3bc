"""The paper's claim at small scale: its table's methods on the same reward model, learning rates, samples and seeds.

    python -m bench.claim.grid             # the default grid; run again, it goes on where it stopped
    python -m bench.claim.grid --quick     # the same path in minutes, results under runs/

Each method's learning rate is chosen on tuning seeds, by the true reward and from one grid for all; the report's
seeds then run at that rate. Writes OUT/claim.json, OUT/*.svg and, with --page, the section of docs/results/claim.md.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a cell is too small for a second thread

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.claim import other_tasks, report, stories
from bench.claim.cells import METHODS, TWO_RMS, Cell, DemoWorld, TinyWorld, World, oracle_cell, run_cell, start_worker
from rto_fast.demo.config import DemoConfig
from rto_fast.demo.tiny_task import DIFFICULTIES, HELD_OUT
from rto_fast.errors import ConfigError, require, shown
from rto_fast.logs.files import write_atomic

ROOT = Path(__file__).parents[2]
PARTS = ("fractions", "difficulty", *stories.TASKS, "ablations", "oracle")


@dataclass(frozen=True, kw_only=True)
class CellsConfig:
    """Sizes of the cells' worlds and runs, and where and how they are run."""

    iterations: int = 32
    """Rollouts of an RL run, of 64 responses each."""
    corpus_rows: int = 4000
    """Texts of the SFT corpus."""
    pairs: int = 1000
    """Preference pairs of each seed."""
    eval_prompts: int = 512
    """Prompts that every model is judged on, with openings that no stage has seen."""
    workers: int = 0
    """Cells at the same time, each in a process with one thread; 0 = one a core."""
    runs: str = "runs/claim"
    """Folder of the cells' results; a finished cell is never run again."""
    report_only: bool = False
    """Train nothing; report the cells that are there."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        for name in ("iterations", "corpus_rows", "pairs", "eval_prompts"):
            require(getattr(self, name) > 0, f"{name}: must be positive, got {getattr(self, name)}")
        require(self.workers >= 0, f"workers: must not be negative, got {self.workers}")


@dataclass(frozen=True, kw_only=True)
class ClaimConfig(CellsConfig):
    """The grid. `iterations`: a multiple of the fractions."""

    parts: tuple[str, ...] = PARTS
    """What to run beside the table, of fractions, difficulty, stories-rule, stories-taste, ablations, oracle."""
    methods: tuple[str, ...] = tuple(m for m in METHODS if m not in ("RLOO", TWO_RMS, "MPO"))
    """Rows of the table; RLOO, PPO on two RMs and MPO, too, can be some."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the report: task, data, initial weights, samples."""
    tuning_seeds: tuple[int, ...] = (100,)
    """Seeds that choose each method's learning rate; never reported."""
    ablation_seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of difficulty, stories and ablations."""
    learning_rates: tuple[float, ...] = (5e-4, 1e-3)
    """Grid of the policy's peak learning rate, the same for all methods; where the best is at an edge, one step more
    is tried."""
    story_learning_rates: tuple[float, ...] = (3e-4, 1e-3)
    """The same on the stories, where the model is pretrained."""
    fractions: tuple[int, ...] = (16, 8, 4, 2)
    """RTO and PPO also on 1/n of the samples, each with a schedule of its own."""

    other_pairs: tuple[int, ...] = (250, 4000)
    """Pairs of the ablation that changes the reward model's and DPO's quality."""
    oracle_samples: tuple[int, int] = (32, 512)
    """Of the tilting oracle: evaluation prompts, and responses to each of the SFT and of the DPO model."""

    out: str = "bench/results/claim"
    """Folder of claim.json and the figures."""
    page: bool = False
    """Write the section of docs/results/claim.md."""
    quick: bool = False
    """A grid of minutes: every setting that is not given shrinks, and the results go below `runs`."""

    def validate(self) -> None:
        super().validate()
        for name, known in (("parts", PARTS), ("methods", METHODS)):
            wrong = [v for v in getattr(self, name) if v not in known]
            require(not wrong, f"{name}: unknown {', '.join(wrong)}; choose from {', '.join(known)}")
        for name in ("seeds", "tuning_seeds", "learning_rates"):
            require(bool(getattr(self, name)), f"{name}: at least one is needed")
        require({"SFT", "PPO", "RTO"} <= set(self.methods), "methods: SFT, PPO and RTO must be among them")
        shared = set(self.tuning_seeds) & {*self.seeds, *self.ablation_seeds}
        require(not shared, f"tuning_seeds: {sorted(shared)} are reported too; the report would be of tuned seeds")
        require(min(self.oracle_samples) > 0, f"oracle_samples: must be positive, got {self.oracle_samples}")
        require(all(n > 0 for n in self.fractions), f"fractions: must be positive, got {self.fractions}")
        for n in self.fractions:
            require(self.iterations % n == 0, f"fractions: 1/{n} of {self.iterations} iterations is no whole number")


QUICK: dict[str, Any] = {
    "parts": ("fractions", "oracle"), "methods": ("SFT", "DPO", "PPO", "RTO"), "seeds": (0, 1), "tuning_seeds": (100,),
    "oracle_samples": (8, 64), "ablation_seeds": (0,), "learning_rates": (5e-4,), "story_learning_rates": (3e-4,),
    "fractions": (4,), "iterations": 16, "corpus_rows": 2000, "eval_prompts": 128, "runs": "runs/claim_quick",
    "out": "runs/claim_quick/results",
}  # fmt: skip


def quickened(config: ClaimConfig) -> ClaimConfig:
    """Every field that still has its default gets QUICK's."""
    default = ClaimConfig()
    return dataclasses.replace(config, **{k: v for k, v in QUICK.items() if getattr(config, k) == getattr(default, k)})


def unknown(task: str) -> bool:
    """Whether `make_world` has no such task."""
    name, _, pairs = task.partition("-")
    many = not pairs or (pairs.isdecimal() and int(pairs) > 0)
    return task not in stories.TASKS and not (name in (*DIFFICULTIES, *other_tasks.TASKS) and many)


@functools.lru_cache(maxsize=4)
def make_world(runs: Path, config: CellsConfig, task: str, seed: int) -> World:
    """The world of a task: easy, medium, hard, whole, long, TASK-N with N pairs, demo, or one of the stories'."""
    root = runs / task / f"seed{seed}" / "world"
    if task in stories.TASKS:
        return stories.StoryWorld(root, task, seed, config.iterations, config.eval_prompts)
    name, _, pairs = task.partition("-")
    settings = DemoConfig(
        output_dir=str(root), seed=seed, corpus_rows=config.corpus_rows, pairs=int(pairs or config.pairs),
        eval_prompts=config.eval_prompts, iterations=config.iterations,
    )  # fmt: skip
    if name == "demo":
        return DemoWorld(root, settings)
    if name in other_tasks.TASKS:
        return TinyWorld(root, *other_tasks.make(name, settings))
    return TinyWorld(root, dataclasses.replace(settings, difficulty=name))


EXTENSIONS = 1
"""Steps beyond the grid of learning rates."""

Found = dict[Cell, dict[str, Any]]


class Grid:
    """Runs cells in worker processes and keeps their results."""

    def __init__(self, config: CellsConfig, runs: Path, pool: ProcessPoolExecutor | None, progress: Progress) -> None:
        """pool: None to take only the results that are there."""
        self.runs, self.pool, self.progress = runs, pool, progress
        self.make_world, self.commit = functools.partial(make_world, runs, config), commit()
        self.bar = progress.add_task("", total=0)
        self.found: Found = {}
        self.missing: set[Cell] = set()

    def run(self, title: str, cells: Iterable[Cell]) -> None:
        """Runs the cells that have no result yet; what they share first."""
        cells = [c for c in dict.fromkeys(cells) if c not in self.found]
        worlds = [w for w in dict.fromkeys(Cell(c.task, c.seed) for c in cells) if w not in self.found]
        for stage in (worlds, [c for c in cells if c.method != "SFT"]):
            self.progress.update(self.bar, description=title, total=len(self.found) + len(stage))
            missing = []
            for cell in stage:
                path = self.runs / f"{cell.name}.json"
                if path.exists():
                    self._keep(title, cell, json.loads(path.read_text()))
                else:
                    missing.append(cell)
            if self.pool:
                self._compute(title, missing)
            else:
                self.missing |= set(missing)

    def _compute(self, title: str, cells: Iterable[Cell]) -> None:
        waiting = {self.pool.submit(run_cell, c, self.make_world, self.runs, self.commit): c for c in cells}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    self._keep(title, waiting.pop(future), future.result())
        except BaseException:
            self.pool.shutdown(wait=False, cancel_futures=True)
            raise

    def _keep(self, title: str, cell: Cell, result: dict[str, Any]) -> None:
        self.found[cell] = result
        self.progress.advance(self.bar)
        judged = result.get("judgement")
        what = f"true reward {judged['true_reward']:.2f}, KL {judged['kl']:.1f}" if judged else result.get("failed", "")
        line = f"{len(self.found):4d}  {title}: {cell.name}: {what or 'done'}, {result['cpu_s']:.0f} s"
        self.progress.console.print(line, highlight=False, soft_wrap=True)

    def tune(self, task: str, methods: Iterable[str], seeds: Iterable[int], grid: Iterable[float]) -> dict[str, float]:
        """The learning rate of each method with the best mean true reward over the tuning seeds, where any was run.

        Where that is the grid's lowest or highest, the next one (half or twice) is tried too, EXTENSIONS times.
        """
        seeds = list(seeds)
        rates = {m: sorted(grid) for m in methods if m != "SFT"}
        best: dict[str, float] = {}
        for _ in range(EXTENSIONS + 1):
            self.run(f"tuning on {task}", [Cell(task, s, m, lr) for m in rates for lr in rates[m] for s in seeds])
            for m, tried in rates.items():
                best[m] = max(tried, key=lambda lr, m=m: mean(self.reward(Cell(task, s, m, lr)) for s in seeds))
                lowest, highest = tried[0] == best[m], tried[-1] == best[m]
                rates[m] = [tried[0] / 2] * lowest + tried + [tried[-1] * 2] * highest
        return {m: lr for m, lr in best.items() if any(c.method == m and c.task == task for c in self.found)}

    def reward(self, cell: Cell) -> float:
        """The model's true reward; a run that diverged, or was not done, has the lowest."""
        judged = self.found.get(cell, {}).get("judgement")
        return judged["true_reward"] if judged else -float("inf")


ABLATIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("RTO", {"beta2": 0.1}), ("RTO", {"beta2": 0.2}), ("PPO", {"beta2": 0.025}), ("PPO", {"beta2": 0.1}),
    ("PPO", {"beta2": 0.0125}), ("PPO", {"beta2": 0.0}),
    ("RTO", {"beta1": 0.05, "dpo_clip": 0.05}), ("RTO", {"beta1": 0.2, "dpo_clip": 0.2}), ("RTO", {"dpo_clip": 0.0}),
    ("RTO", {"critic": "policy"}), ("PPO", {"critic": "policy"}),
)  # fmt: skip
"""What is changed in RTO and PPO, at their learning rates, to see what their distance depends on."""


def experiment(config: ClaimConfig, grid: Grid) -> dict[str, dict[str, float]]:
    """Runs all parts; returns the chosen learning rates by task."""
    chosen = {"medium": grid.tune("medium", config.methods, config.tuning_seeds, config.learning_rates)}
    few = [m for m in ("SFT", "DPO", "PPO", "RTO") if m in config.methods]

    def cells(task: str, methods: Iterable[str], seeds: Iterable[int], **more: Any) -> list[Cell]:
        rates = chosen.get(task, chosen["medium"])
        return [Cell(task, s, m, rates.get(m, 0.0), **more) for s in seeds for m in methods]

    grid.run("report", cells("medium", config.methods, config.seeds))
    if "fractions" in config.parts:
        both = ("PPO", "RTO")
        grid.run("fractions", [c for n in config.fractions for c in cells("medium", both, config.seeds, part=n)])
    if "difficulty" in config.parts:
        grid.run("difficulty", [c for task in ("easy", "hard") for c in cells(task, few, config.ablation_seeds)])
    if "oracle" in config.parts:
        grid.run("oracle", [oracle_cell("medium", s, *config.oracle_samples) for s in config.seeds])
    for task in stories.TASKS:
        if task in config.parts and stories.available():
            chosen[task] = grid.tune(task, few, config.tuning_seeds[:1], config.story_learning_rates)
            grid.run(task, cells(task, few, config.ablation_seeds))
    if "ablations" in config.parts:
        grid.run("ablations", [
            c for m, change in ABLATIONS
            for c in cells("medium", (m,), config.ablation_seeds, change=tuple(change.items()))
        ])  # fmt: skip
        tasks = [f"medium-{n}" for n in config.other_pairs]
        grid.run("other pairs", [c for task in tasks for c in cells(task, few, config.ablation_seeds)])
    return chosen


def open_runs(config: CellsConfig, runs: Path) -> None:
    """Makes the folder of runs, or checks that its cells have these sizes."""
    sizes = {k: getattr(config, k) for k in ("iterations", "corpus_rows", "pairs", "eval_prompts")}
    of_one_size(runs, "cells", sizes | {"held_out": HELD_OUT})


def of_one_size(folder: Path, what: str, sizes: dict[str, Any]) -> None:
    """Makes a folder of results that are made once; ConfigError where it holds those of other sizes."""
    path, sizes = folder / "sizes.json", json.loads(json.dumps(sizes))
    theirs = json.loads(path.read_text()) if path.exists() else sizes
    changed = [f"{k}={theirs.get(k)} (now {v})" for k, v in sizes.items() if theirs.get(k) != v]
    require(not changed, f"runs: {folder} holds {what} of other sizes: {', '.join(changed)}; use another --runs")
    write_atomic(path, json.dumps(sizes) + "\n")


def commit() -> str:
    """The checkout's commit, marked where files differ from it; empty outside a checkout."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    return found.stdout.strip()


@contextmanager
def opened(config: CellsConfig, runs: Path) -> Iterator[Grid]:
    """A grid whose cells lie below `runs`, with its workers; none where only what is there is reported."""
    open_runs(config, runs)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    workers = config.workers or len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, console=Console()))
        pool = None
        if not config.report_only:
            pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=start_worker, initargs=(runs,))
            stack.enter_context(pool)
        yield Grid(config, runs, pool, progress)


def by_flags(main: Callable[[Any], None], settings: type, text: str | None) -> None:
    """`main` of the settings that the command line gives; what is wrong with them is one line, and exit code 2."""
    try:
        main(tyro.cli(settings, description=text))
    except ConfigError as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        sys.exit(2)


def main(config: ClaimConfig) -> None:
    config = quickened(config) if config.quick else config
    config.validate()
    runs, out, console = ROOT / config.runs, ROOT / config.out, Console()
    if set(stories.TASKS) & set(config.parts) and not stories.available():
        console.print(f"stories: no model at {stories.MODEL}; they are left out")
    with opened(config, runs) as grid:
        chosen = experiment(config, grid)
    flags = [a for a in sys.argv[1:] if a != "--report-only"]
    command = f"python -m bench.claim.grid {shlex.join(flags)}"
    record = {
        "command": command.strip(), "commits": sorted({c["commit"] for c in grid.found.values()}),
        "settings": dataclasses.asdict(config),
        "learning_rates": chosen, "cells": list(grid.found.values()), "missing": sorted(c.name for c in grid.missing),
    }  # fmt: skip
    report.write(record, out, ROOT / "docs" / "results" / "claim.md" if config.page else None, console)


if __name__ == "__main__":
    by_flags(main, ClaimConfig, __doc__)
