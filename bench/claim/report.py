"""The claim's results: claim.json, the table, the figures and the section of docs/results/claim.md."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from rich.console import Console

from bench.claim.cells import METHODS, ORACLE, PAYS_TOKENS, PREFERENCE, RL
from bench.claim.estimates import interval
from rto_fast.errors import require
from rto_fast.logs.files import finite_or_none, write_atomic

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

COLOURS = {"SFT": "#888888", "DPO": "#2a9d5c", "PPO": "#d1690f", "RTO": "#1f5fbf"}
WINDOW = 4
"""Iterations that a point of a curve averages."""

Result = dict[str, Any]


def shown(values: Sequence[float], sign: str = "") -> str:
    """`1.23 ± 0.45`, or `1.23` where there is no interval."""
    middle, half = interval(values)
    return f"{middle:{sign}.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")


class Results:
    """The cells of a record, to be asked for."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.cells: list[Result] = record["cells"]
        self.seeds, self.rates = record["settings"]["seeds"], record["learning_rates"]
        self.ablation_seeds = record["settings"]["ablation_seeds"]

    def of(
        self, method: str, task: str = "medium", *, part: int = 1, change: Iterable = (), seeds: Sequence[int] = ()
    ) -> list[Result]:
        """A method's cells at its chosen learning rate, in the order of the seeds; those that diverged are left out."""
        rate = self.rates.get(task, self.rates["medium"]).get(method, 0.0)
        key = (method, task, rate, part, [list(c) for c in change])
        found = {
            c["seed"]: c for c in self.cells
            if (c["method"], c["task"], c["lr"], c["part"], [list(x) for x in c["change"]]) == key and "judgement" in c
        }  # fmt: skip
        return [found[s] for s in seeds or self.seeds if s in found]

    def changes(self) -> list[tuple[str, tuple]]:
        """The ablations: (method, what is changed)."""
        changed = [c for c in self.cells if c["change"] and c["method"] != ORACLE]
        return list(dict.fromkeys((c["method"], tuple(map(tuple, c["change"]))) for c in changed))

    def oracles(self, task: str = "medium") -> list[Result]:
        """The tilting oracle's cells."""
        return [c for c in self.cells if c["method"] == ORACLE and c["task"] == task]

    def tasks(self) -> list[str]:
        return list(dict.fromkeys(c["task"] for c in self.cells))


def rewards(cells: Sequence[Result]) -> list[float]:
    return figures(cells, "true_reward")


def figures(cells: Sequence[Result], name: str) -> list[float]:
    return [c["judgement"][name] for c in cells]


def versus(cells: Sequence[Result], others: Sequence[Result]) -> list[float]:
    """Differences of the true reward, seed by seed, where both are there."""
    base = {c["seed"]: c["judgement"]["true_reward"] for c in others}
    return [c["judgement"]["true_reward"] - base[c["seed"]] for c in cells if c["seed"] in base]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(label: str, cells: Sequence[Result], ppo: Sequence[Result], rate: float | None) -> list[str]:
    """A row of the main table."""
    gap = versus(cells, ppo)
    return [
        label, f"{rate:g}" if rate else "",
        shown(rewards(cells)), shown(gap, "+") if gap and cells is not ppo else "",
        f"{100 * mean(figures(cells, 'win_rate')):.0f} %", f"{mean(figures(cells, 'kl')):.1f}".replace("-0.0", "0.0"),
        f"{mean(figures(cells, 'length')):.0f}", f"{len(cells)}",
    ]  # fmt: skip


HEADER = ("method", "rate", "true reward", "minus PPO's", "win rate", "KL, nats", "length", "seeds")


def main_table(results: Results) -> str:
    ppo = results.of("PPO")
    found = {m: results.of(m) for m in METHODS}
    rates = results.rates["medium"]
    return markdown(HEADER, [
        summary(f"**{m}**" if m == "RTO" else m, ppo if m == "PPO" else cells, ppo, rates.get(m))
        for m, cells in found.items() if cells
    ])  # fmt: skip


def fraction_table(results: Results) -> str:
    parts = sorted({c["part"] for c in results.cells}, reverse=True)
    total = int(results.of("PPO")[0]["curve"]["samples"][-1])
    rows = []
    for part in parts:
        ppo, rto = (results.of(m, part=part) for m in ("PPO", "RTO"))
        rows.append([f"1/{part}" if part > 1 else "1", f"{total // part:,}", shown(rewards(ppo)), shown(rewards(rto)),
                     shown(versus(rto, ppo), "+")])  # fmt: skip
    return markdown(("share", "samples", "PPO", "RTO", "RTO − PPO"), rows)


TASKS = {
    "easy": "easy", "medium": "medium", "hard": "hard", "medium-250": "medium, 250 pairs",
    "medium-4000": "medium, 4,000 pairs", "stories-rule": "stories, stated rule",
    "stories-taste": "stories, unknown rule",
}  # fmt: skip


QUALITY = {"rm": "RM", "dpo": "DPO's raw sum", "dpo_paid": "its clipped sum, as paid"}
"""The learnt rewards of a response whose correlation with the truth is given, where it was measured."""


def task_table(results: Results) -> str:
    """Each task: the learnt rewards' quality, and four models."""
    rows = []
    for task in sorted(results.tasks(), key=lambda t: list(TASKS).index(t) if t in TASKS else len(TASKS)):
        sft, dpo, ppo, rto = (results.of(m, task) for m in ("SFT", "DPO", "PPO", "RTO"))
        if sft and ppo and rto:
            known = [k for k in QUALITY if all(k in c["quality"] for c in sft)]
            quality = ", ".join(f"{mean(c['quality'][k] for c in sft):.2f}" for k in known)
            cells = (sft, dpo, ppo, rto)
            kl = ", ".join(f"{mean(figures(c, 'kl')):.1f}" for c in (ppo, rto))
            row = [shown(rewards(c)) if c else "" for c in cells]
            rows.append([TASKS.get(task, task), quality, *row, shown(versus(rto, ppo), "+"), kl, f"{len(rto)}"])
    names = ("SFT", "DPO", "PPO", "RTO", "RTO − PPO", "KL (PPO, RTO)", "seeds")
    sums = ", ".join(label for k, label in QUALITY.items() if all(k in c.get("quality", {k: 0}) for c in results.cells))
    return markdown(("task", f"correlation with the truth ({sums})", *names), rows)


def ablation_table(results: Results) -> str:
    seeds = results.ablation_seeds
    rows = []
    for method in ("PPO", "RTO"):
        for change in [(), *(c for m, c in results.changes() if m == method)]:
            cells = results.of(method, change=change, seeds=seeds)
            if cells:
                what = ", ".join(f"{k} {v}" for k, v in change) or "as above"
                rows.append([method, what, shown(rewards(cells)), f"{mean(figures(cells, 'kl')):.1f}",
                             f"{100 * mean(figures(cells, 'win_rate')):.0f} %", f"{len(cells)}"])  # fmt: skip
    return markdown(("method", "changed", "true reward", "KL, nats", "win rate", "seeds"), rows)


def blocks(values: Sequence[float]) -> list[Sequence[float]]:
    """WINDOW values after one another; the last block may be shorter."""
    return [values[i : i + WINDOW] for i in range(0, len(values), WINDOW)]


def mean_curve(cells: Sequence[Result], x: str) -> tuple[list[float], list[float]]:
    """The figure `x` and the true reward of each block of iterations, means over the seeds."""
    columns = []
    for name in (x, "reward"):
        seeds = [c["curve"][name] for c in cells]
        seeds = [[b[-1] if name == "samples" else mean(b) for b in blocks(s)] for s in seeds]
        columns.append([mean(v) for v in zip(*seeds, strict=True)])
    return columns[0], columns[1]


def style(method: str) -> dict[str, Any]:
    others = [m for m in METHODS if m not in COLOURS]
    colour = COLOURS.get(method) or pyplot.colormaps["tab20"](others.index(method) / len(others))
    return {
        "color": colour, "linewidth": 2.4 if method in COLOURS else 1.1,
        "linestyle": "-" if method in PAYS_TOKENS or method == "PPO" else "--",
    }  # fmt: skip


ORACLE_STYLES = {
    "rm": ("SFT, tilted by the RM", ":"),
    "rm + dpo": ("by RM + DPO", "-."),
    "truth": ("by the truth", "--"),
}


def draw_oracle(axis: Axes, cells: Sequence[Result]) -> None:
    """The tilting oracle's lines on an axis of KL, as far as all seeds' go: means and 95 % t intervals over the seeds;
    nothing where it was not asked."""
    for name, (label, stroke) in ORACLE_STYLES.items() if cells else ():
        columns = list(zip(*(c["oracle"][name] for c in cells), strict=False))
        kl = [mean(p["kl"] for p in column) for column in columns]
        middle, half = zip(*(interval([p["true_reward"] for p in column]) for column in columns), strict=True)
        axis.plot(kl, middle, stroke, color="black", linewidth=1, label=label)
        low, high = ([m + sign * h for m, h in zip(middle, half, strict=True)] for sign in (-1, 1))
        axis.fill_between(kl, low, high, color="black", alpha=0.08, linewidth=0)


def draw_curves(results: Results, path: Path) -> None:
    """True reward against samples and against KL."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for method in RL:
        if cells := results.of(method):
            left.plot(*mean_curve(cells, "samples"), label=method, **style(method))
            right.plot(*mean_curve(cells, "kl"), label="_", **style(method))
    for method in ("SFT", "DPO"):
        if cells := results.of(method):
            left.axhline(mean(rewards(cells)), color=COLOURS[method], linestyle=":", label=method)
    for method in PREFERENCE:
        if cells := results.of(method):
            point = mean(figures(cells, "kl")), mean(rewards(cells))
            right.plot(*point, "o", color=COLOURS["DPO"], markersize=4)
            right.annotate(method, point, fontsize=7, xytext=(3, 3), textcoords="offset points")
    left.set(xlabel="responses drawn", ylabel="true reward")
    draw_oracle(right, results.oracles())
    if results.oracles():
        right.legend(fontsize=7, frameon=False)
    right.set(xlabel="KL to SFT, nats a response", ylabel="true reward", xscale="symlog")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=7, frameon=False)
    save(figure, path)


def draw_scale(results: Results, path: Path) -> None:
    """The data-fraction figure, difficulty, and KL against reward at several beta2."""
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    parts = sorted({c["part"] for c in results.cells}, reverse=True)
    total = int(results.of("PPO")[0]["curve"]["samples"][-1])
    for method in ("PPO", "RTO"):
        points = [interval(rewards(results.of(method, part=p))) for p in parts]
        left.errorbar([total / p for p in parts], *zip(*points, strict=True), label=method, capsize=3, marker="o",
                      color=COLOURS[method])  # fmt: skip
    left.set(xlabel="samples of the whole run", ylabel="true reward", xscale="log", title="Share of the samples")
    left.set_xticks([total // p for p in parts], [f"{total // p:,}" for p in parts])
    left.minorticks_off()
    left.legend()

    tasks = [t for t in ("easy", "medium", "hard") if t in results.tasks()]
    for i, method in enumerate(COLOURS):
        points = [(j, *interval(rewards(cells))) for j, t in enumerate(tasks) if (cells := results.of(method, t))]
        for j, middle_of, half in points:
            middle.bar(j + 0.2 * (i - 1.5), middle_of, 0.18, yerr=half, color=COLOURS[method], capsize=2,
                       label=method if not j else None)  # fmt: skip
    middle.set_xticks(range(len(tasks)), tasks)
    middle.set(ylabel="true reward", title="Difficulty")
    middle.legend(fontsize=7)

    for method in ("PPO", "RTO"):
        changes = [c for m, c in results.changes() if m == method and [k for k, _ in c] == ["beta2"]]
        points = [results.of(method, change=c, seeds=results.ablation_seeds) for c in [(), *changes]]
        xy = sorted((mean(figures(c, "kl")), mean(rewards(c))) for c in points if c)
        right.plot(*zip(*xy, strict=True), "o-", color=COLOURS[method], label=method)
    draw_oracle(right, results.oracles())
    right.legend(fontsize=7)
    right.set(xlabel="KL to SFT, nats a response", ylabel="true reward", title="At several beta2")
    save(figure, path)


def save(figure: pyplot.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def section(record: dict[str, Any], folder: str) -> str:
    """The page's section, tables and figures."""
    results, settings = Results(record), record["settings"]
    samples = int(results.of("PPO")[0]["curve"]["samples"][-1])
    seeds, tuning = (", ".join(map(str, settings[k])) for k in ("seeds", "tuning_seeds"))
    text = [
        f"`{record['command']}`, seeds {seeds}, medium difficulty. All methods share the SFT model, "
        f"{settings['pairs']:,} pairs,\nthe reward model, the DPO model and the prompts; every RL method draws "
        f"{samples:,} samples. Each method's learning rate is the best\nof one grid on other seeds ({tuning}). Judged "
        f"by the true reward on {settings['eval_prompts']} prompts that no stage has seen; mean ± 95 % t\n"
        "interval over seeds, differences seed by seed."
        + (f" {len(record['missing'])} cells of the grid had not run." if record["missing"] else ""),
        main_table(results),
        f"![True reward against samples and against KL]({folder}/curves.svg)",
    ]
    if settings["fractions"] and len({c["part"] for c in results.cells}) > 1:
        text += ["RTO and PPO on a share of the samples, each a run with its own schedule:", fraction_table(results)]
    text += ["By task, at the learning rates above (the stories have their own):", task_table(results)]
    text += [f"![Share of the samples, difficulty, beta2]({folder}/scale.svg)"]
    if results.changes():
        seeds = ", ".join(map(str, results.ablation_seeds))
        title = f"<details><summary>What the distance depends on (seeds {seeds})</summary>"
        text += [title, ablation_table(results), "</details>"]
    return "\n" + "\n\n".join(text) + "\n"


def write(record: dict[str, Any], out: Path, page: Path | None, console: Console) -> None:
    """claim.json and the figures; the section between a page's marks where a page is given."""
    write_atomic(out / "claim.json", compact(finite_or_none(record)))
    pyplot.rcParams.update({"svg.hashsalt": "claim", "font.size": 9, "axes.spines.top": False,
                            "axes.spines.right": False})  # fmt: skip
    results = Results(record)
    draw_curves(results, out / "curves.svg")
    draw_scale(results, out / "scale.svg")
    write_atomic(out / "tables.md", section(record, ".").lstrip())
    console.print(main_table(results), highlight=False, soft_wrap=True)
    console.print(f"{out}: claim.json, tables.md, curves.svg, scale.svg")
    if page:
        text = section(record, Path(os.path.relpath(out, page.parent)).as_posix())
        put_between(page, ("<!-- claim -->", "<!-- /claim -->"), text)


def put_between(page: Path, marks: tuple[str, str], made: str) -> None:
    """Writes `made` between a page's marks; ConfigError where one of them is missing or comes twice."""
    text, (start, end) = page.read_text(), marks
    whole = text.count(start) == text.count(end) == 1
    require(whole, f"page: {page} must have {start} and {end} once each")
    head, _, rest = text.partition(start)
    write_atomic(page, f"{head}{start}{made}{end}{rest.partition(end)[2]}")


def compact(record: dict[str, Any]) -> str:
    """JSON with a line a cell."""
    head = {k: v for k, v in record.items() if k != "cells"}
    lines = ",\n".join("  " + json.dumps(c) for c in record["cells"])
    return json.dumps(head, indent=1)[:-2] + ',\n "cells": [\n' + lines + "\n ]\n}\n"
