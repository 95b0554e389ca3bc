"""The designs' results: designs.json, tables, figures, and the page docs/results/designs.md."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import matplotlib
import numpy as np

from bench.claim.ablations import METHODS as ABLATED_METHODS
from bench.claim.cells import TWO_RMS, Cell
from bench.claim.designs import CENTRE, MAIN, Choice, Design, DesignConfig, as_json
from bench.claim.estimates import (
    Points,
    at_kl,
    bootstrap_factor,
    detectable,
    differences,
    holm,
    interval,
    mean_differences,
    running_best,
    sign_flip_p,
)
from bench.claim.report import COLOURS, compact, draw_oracle, markdown, put_between, save, shown
from rto_fast.logs.files import finite_or_none, write_atomic

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

CONTRASTS: dict[str, tuple[str, str]] = {
    "RTO − PPO": ("RTO", "PPO"),
    "credit: RTO − DDPO": ("RTO", "DDPO"),
    "credit: RS-PPO − PPO": ("RS-PPO", "PPO"),
    "second opinion: DDPO − PPO on two RMs": ("DDPO", TWO_RMS),
}
"""Name -> (ours, theirs). On MAIN, Holm's rule takes their means over the range together: the four hypotheses."""
STYLES = COLOURS | {"DDPO": "#8e44ad", "RS-PPO": "#c0392b", TWO_RMS: "#b7950b"}

Contrast = dict[str, Any]


def all_matched(design: Design) -> dict[str, dict[int, Points]]:
    """Method -> seed -> its models, of the task's methods."""
    return {m: design.matched(m) for m in design.scale.methods}


def contrasted(design: Design) -> dict[str, tuple[str, str]]:
    """The contrasts whose methods the task has."""
    return {name: pair for name, pair in CONTRASTS.items() if {*pair} <= {*design.scale.methods}}


def contrasts(design: Design) -> list[Contrast]:
    """Design A's differences at equal KL: at each level and over the range; p values over the range.

    `best` is over the range too, where runs that collapsed do not count (estimates.running_best); it tests nothing.
    """
    config, points = design.config, all_matched(design)
    best = {m: {s: running_best(p) for s, p in of_seeds.items()} for m, of_seeds in points.items()}
    rows = []
    for name, (ours, theirs) in contrasted(design).items():
        at = {kl: differences(points[ours], points[theirs], kl) for kl in design.kl_levels}
        over, kept = (mean_differences(p[ours], p[theirs], *design.kl_range, config.least) for p in (points, best))
        rows.append({"name": name, "at": at, "over": over, "best": kept, "p": sign_flip_p(list(over.values()))})
    tested = {r["name"]: r["p"] for r in rows if not math.isnan(r["p"])}
    adjusted = holm(tested) if design.task == MAIN else {}
    return [r | {"holm": adjusted.get(r["name"])} for r in rows]


def factors(design: Design) -> list[dict[str, Any]]:
    """Design B's factors at each share of PPO's plateau, as it is and with RTO at PPO's KL."""
    rows = []
    for held in (False, True):
        ppo, rto = design.curves(held)
        for share in design.config.shares if ppo else ():
            middle, low, high = bootstrap_factor(ppo, rto, share, design.config.draws)
            rows.append({"held": held, "share": share, "factor": middle, "low": low, "high": high, "seeds": len(ppo)})
    return rows


ABLATED = {n: c for n, c in CONTRASTS.items() if {*c} <= {*ABLATED_METHODS}} | {"DDPO − PPO": ("DDPO", "PPO")}
"""Design C's differences."""


def ablated(design: Design) -> list[dict[str, Any]]:
    """Design C: of each ablation the differences at equal KL over the range, and each method's models."""
    config, rows = design.config, []
    for ablation in design.ablations:
        points = {m: design.ablated(ablation, m) for m in ABLATED_METHODS}
        over = {
            name: mean_differences(points[ours], points[theirs], *design.kl_range, config.least)
            for name, (ours, theirs) in ABLATED.items()
        }
        rows.append({"name": ablation.name, "over": over, "points": points})
    return rows


def system_rows(design: Design) -> list[dict[str, Any]]:
    """Design D: each system's judgements by seed, and its true reward less that of what it varies."""
    rows, seeds = [], design.config.ablation_seeds
    for system in design.systems:
        found = {s: j for s in seeds if (j := design.judged(design.system_cell(system, s)))}
        rows.append({"name": system.name, "against": system.against, "found": found})
    rewards = {r["name"]: {s: reward for s, (_, reward) in r["found"].items()} for r in rows}
    for r in rows:
        ours, theirs = rewards[r["name"]], rewards.get(r["against"], {})
        r["differences"] = {s: ours[s] - theirs[s] for s in ours if s in theirs}
    return rows


# Tables


def with_seeds(values: Sequence[float], wanted: int) -> str:
    """A difference with its interval, and how many of the seeds it has where that is not all."""
    if not values:
        return ""
    return shown(values, "+") + (f" ({len(values)})" if len(values) < wanted else "")


def contrast_table(design: Design, rows: Sequence[Contrast]) -> str:
    seeds = len(design.scale.seeds)
    low, high = design.kl_range
    header = ["difference", *(f"{kl:g} nats" for kl in design.kl_levels), f"mean of {low:g} to {high:g}", "p"]
    tested = any(r["holm"] is not None for r in rows)
    header += ["p, Holm", "decision"] if tested else []
    lines = []
    for r in rows:
        line = [r["name"], *(with_seeds(list(d.values()), seeds) for d in r["at"].values())]
        line += [with_seeds(list(r["over"].values()), seeds), p_value(r["p"])]
        if tested:
            p = r["holm"]
            line += ["", ""] if p is None else [p_value(p), decision(list(r["over"].values()), p)]
        lines.append(line)
    return markdown(header, lines)


def collapse_table(design: Design, rows: Sequence[Contrast]) -> str:
    """How much of a difference is runs that collapsed: medians, signs, and curves that never fall."""
    seeds, lines = len(design.scale.seeds), []
    for r in rows:
        over = list(r["over"].values())
        if over:
            ahead = f"{sum(d > 0 for d in over)} of {len(over)}"
            least = f"{detectable(stdev(over), len(over)):.2f}" if len(over) > 1 else ""
            lines.append([r["name"], shown(over, "+"), f"{median(over):+.2f}", ahead, least,
                          with_seeds(list(r["best"].values()), seeds)])  # fmt: skip
    low, high = design.kl_range
    header = [
        f"{low:g} to {high:g} nats",
        "mean",
        "median",
        "seeds ahead",
        "found 4 times in 5",
        "mean, no curve falling",
    ]
    return markdown(header, lines)


def p_value(p: float) -> str:
    """Three digits; no p of a test is 0."""
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


SMALL = 0.5
"""A difference below which nothing is lost, a sixth of what PPO gains."""


def decision(values: Sequence[float], p: float) -> str:
    """What the protocol's rule says of a hypothesis. values: differences by seed; p: adjusted."""
    middle, half = interval(values)
    if p < 0.05:
        return "supported" if middle > 0 else "reversed"
    return f"smaller than {SMALL:g}" if middle + half < SMALL else "unresolved"


def method_table(design: Design) -> str:
    """Every method at every penalty: true reward and KL."""
    lines = []
    for method in design.scale.methods:
        for beta2 in design.penalties(method):
            found = [design.judged(design.matched_cell(s, method, beta2)) for s in design.scale.seeds]
            there = [f for f in found if f]
            if there:
                kl = shown([k for k, _ in there])
                lines.append([method, f"{beta2:g}", shown([r for _, r in there]), kl, f"{len(there)}"])
    return markdown(("method", "beta2", "true reward", "KL, nats", "seeds"), lines)


def ablation_table(design: Design, rows: Sequence[Mapping[str, Any]]) -> str:
    seeds = len(design.config.ablation_seeds)
    low, high = design.kl_range
    header = ["changed", *(f"{name}, {low:g} to {high:g} nats" for name in ABLATED)]
    header += [f"{m}: furthest, nats" for m in ABLATED_METHODS]
    lines = []
    for row in rows:
        furthest = [[max(p)[0] for p in row["points"][m].values()] for m in ABLATED_METHODS]
        lines.append([row["name"], *(with_seeds(list(d.values()), seeds) for d in row["over"].values()),
                      *(shown(kl) if kl else "" for kl in furthest)])  # fmt: skip
    return markdown(header, lines)


def system_table(design: Design, rows: Sequence[Mapping[str, Any]]) -> str:
    seeds, lines = len(design.config.ablation_seeds), []
    for r in rows:
        if r["found"]:
            kl, reward = zip(*r["found"].values(), strict=True)
            lines.append([r["name"], shown(reward), with_seeds(list(r["differences"].values()), seeds), r["against"],
                          shown(kl), f"{len(reward)}"])  # fmt: skip
    return markdown(("", "true reward", "difference", "from", "KL, nats", "seeds"), lines)


def choice_table(choices: Sequence[Choice]) -> str:
    """Chosen rates, and the true reward on the tuning seeds at the truth's own choice."""
    lines = [
        [c.method, f"{c.iterations}", f"{c.rate:g}", f"{c.tried[c.rate]['reward']:.2f}", f"{c.truth_rate:g}",
         f"{c.tried[c.truth_rate]['reward']:.2f}", ", ".join(f"{r:g}" for r in c.tried)]
        for c in choices if math.isfinite(c.tried[c.rate]["score"])
    ]  # fmt: skip
    header = ("method", "rollouts", "rate", "true reward", "the truth's rate", "its true reward", "tried")
    return markdown(header, lines)


def budget_table(design: Design) -> str:
    ppo, rto = design.curves()
    _, held = design.curves(held=True)
    lines = []
    for i, (samples, _) in enumerate(ppo[0]):
        found = [shown([c[i][1] for c in curves]) if curves else "" for curves in (ppo, rto, held)]
        lines.append([f"{samples:,.0f}", *found])
    return markdown(("samples", "PPO", "RTO", "RTO at PPO's KL"), lines)


def factor_table(rows: Sequence[Mapping[str, Any]], decides: bool) -> str:
    """The factors; the verdict on the paper's stands at the highest level alone, with RTO as it is.

    decides: whether there is a verdict at all, as on MAIN alone.
    """
    highest = max(r["share"] for r in rows)
    lines = [
        [f"{100 * r['share']:g} %", "RTO at PPO's KL" if r["held"] else "RTO",
         f"{r['factor']:.2f} ({r['low']:.2f} to {r['high']:.2f})",
         *([verdict(r["low"], r["high"]) if r["share"] == highest and not r["held"] else ""] if decides else []),
         f"{r['seeds']}"]
        for r in rows
    ]  # fmt: skip
    header = ("level, of PPO's highest", "", "n(PPO) / n(RTO), 95 %", *(("a factor of 8",) if decides else ()), "seeds")
    return markdown(header, lines)


def verdict(low: float, high: float, claimed: float = 8.0) -> str:
    """What an interval says of the paper's factor."""
    if math.isnan(high):
        return "no plateau"
    return "refuted" if high < claimed else "reached" if low >= claimed else "unresolved"


# Figures


def draw_matched(design: Design, path: Path) -> None:
    """True reward against KL with the oracle's lines, and the contrasts' differences; bands are 95 % t intervals."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    grid = np.linspace(0.25, 1.2 * max(design.kl_levels), 40)
    points = all_matched(design)
    for method, of_seeds in points.items():
        values = {kl: [v for p in of_seeds.values() if not math.isnan(v := at_kl(p, kl))] for kl in grid}
        band(left, values, len(of_seeds), method, STYLES[method])
        for of_seed in of_seeds.values():
            there = [p for p in of_seed[1:] if p[0] <= grid[-1]] or [(math.nan, math.nan)]
            left.plot(*zip(*there, strict=True), ".", color=STYLES[method], markersize=3, alpha=0.4)
    oracles = [design.grid.found[c] for s in design.scale.seeds if (c := design.oracle(s)) in design.grid.found]
    draw_oracle(left, oracles)
    left.set(xlabel="KL to SFT, nats a response", ylabel="true reward", xlim=(0, 1.2 * grid[-1]))
    left.legend(fontsize=7, frameon=False)
    colours = pyplot.colormaps["tab10"].colors
    for (name, (ours, theirs)), colour in zip(contrasted(design).items(), colours, strict=False):
        values = {kl: list(differences(points[ours], points[theirs], kl).values()) for kl in grid}
        band(right, values, len(points[ours]), name, colour)
    right.axhline(0, color="black", linewidth=0.7)
    right.set(xlabel="KL to SFT, nats a response", ylabel="difference of true rewards at equal KL")
    right.legend(fontsize=7, frameon=False)
    save(figure, path)


def band(axis: Axes, values: Mapping[float, Sequence[float]], seeds: int, label: str, colour: Any) -> None:
    """Mean and 95 % t interval where at least two and half of the seeds are."""
    there = {x: interval(v) for x, v in values.items() if len(v) >= max(2, seeds / 2)}
    if there:
        middle, half = (np.array(v) for v in zip(*there.values(), strict=True))
        axis.plot(list(there), middle, color=colour, label=label)
        axis.fill_between(list(there), middle - half, middle + half, color=colour, alpha=0.15, linewidth=0)


def draw_budgets(design: Design, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """True reward against samples, and the factors with their intervals."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    (ppo, rto), (_, held) = design.curves(), design.curves(held=True)
    arms = (("PPO", ppo, STYLES["PPO"]), ("RTO", rto, STYLES["RTO"]), ("RTO at PPO's KL", held, "#7fb3d5"))
    for label, curves, colour in arms:
        if curves:
            band(left, at_budgets(curves), len(curves), label, colour)
    left.set(xlabel="samples of the whole run", ylabel="true reward", xscale="log")
    budgets = design.scale.budgets
    left.set_xticks(budgets, [f"{n:,}" for n in budgets])
    left.minorticks_off()
    left.legend(fontsize=7, frameon=False)
    for i, r in enumerate(rows):
        right.plot([r["low"], r["high"]], [-i, -i], color="black", linewidth=1)
        right.plot(r["factor"], -i, "o", color="#7fb3d5" if r["held"] else STYLES["RTO"])
    right.axvline(1, color="black", linewidth=0.7)
    right.axvline(8, color=STYLES["PPO"], linestyle=":", label="the paper's 8")
    right.set_yticks([-i for i in range(len(rows))],
                     [f"{100 * r['share']:g} %" + (", PPO's KL" if r["held"] else "") for r in rows])  # fmt: skip
    right.set(xlabel="samples of PPO / samples of RTO", ylabel="level, of PPO's highest")
    right.legend(fontsize=7, frameon=False)
    save(figure, path)


def at_budgets(curves: Sequence[Points]) -> dict[float, list[float]]:
    """Samples -> the seeds' rewards, without the SFT model's."""
    return {x: [c[i][1] for c in curves] for i, (x, _) in enumerate(curves[0]) if x}


# What is written


def task_record(design: Design) -> dict[str, Any]:
    """All figures of a task, as JSON."""
    by_name = lambda d: {str(k): v for k, v in d.items()}  # noqa: E731
    rows = contrasts(design) if "A" in design.config.designs else []
    return {
        "choices": [as_json(c) | {"design": key[0]} for key, c in design.choices.items()],
        "contrasts": [r | {"at": {str(k): by_name(v) for k, v in r["at"].items()}, "over": by_name(r["over"]),
                           "best": by_name(r["best"])} for r in rows],
        "factors": factors(design) if "B" in design.config.designs else [],
        "ablations": [r | {"over": {n: by_name(d) for n, d in r["over"].items()},
                           "points": {m: by_name(p) for m, p in r["points"].items()}} for r in ablated(design)],
        "systems": [r | {"found": by_name(r["found"]), "differences": by_name(r["differences"])}
                    for r in system_rows(design)],
    }  # fmt: skip


def task_section(design: Design, found: Mapping[str, Any], folder: str) -> list[str]:
    """A task's tables and figures."""
    scale, config = design.scale, design.config
    text = [f"## {design.task}"]
    if "A" in config.designs:
        text += [
            f"Design A, seeds {span(scale.seeds)}: differences of true rewards at equal KL, paired by seed, mean ±\n"
            "95 % t interval; the number of seeds in brackets where not all reach. p: all changes of signs, two-sided.",
            contrast_table(design, rows := contrasts(design)),
            "Beside the protocol: what a t test of so many seeds would find four times in five, and how much of the\n"
            "difference is runs that collapsed: in the last column each curve is its running maximum, so that such a\n"
            "run counts as the best one before it.",
            collapse_table(design, rows),
            f"![True reward against KL, and differences at equal KL]({folder}/matched-{design.task}.svg)",
            f"<details><summary>Every method at every penalty, and the rates (tuned on {span(scale.tuning_seeds)})"
            "</summary>",
            method_table(design),
            choice_table([c for k, c in design.choices.items() if k[0] == "A"]),
            "</details>",
        ]
    if "B" in config.designs and found["factors"]:
        text += [
            f"Design B, seeds {span(scale.budget_seeds)}: true reward by budget, and by how many times fewer samples\n"
            "RTO reaches a level of the highest point of PPO's curve (bootstrap over seeds).",
            factor_table(found["factors"], design.task == MAIN),
            budget_table(design),
            f"![True reward against samples, and factors]({folder}/budgets-{design.task}.svg)",
            f"<details><summary>The rates (tuned on {span(scale.budget_tuning_seeds)})</summary>",
            choice_table([c for k, c in design.choices.items() if k[0] == "B"]),
            "</details>",
        ]
    if any(p for r in found["ablations"] for p in r["points"].values()):
        text += [
            f"Design C, seeds {span(config.ablation_seeds)}: such differences with one part of the training changed.",
            ablation_table(design, ablated(design)),
        ]
    if any(r["found"] for r in found["systems"]):
        text += [
            f"Design D, seeds {span(config.ablation_seeds)}: variants at beta2 {CENTRE:g}, paired by seed.",
            system_table(design, system_rows(design)),
        ]
    return text


def span(seeds: Sequence[int]) -> str:
    """`200–211`, or the seeds one by one."""
    whole = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))) and len(seeds) > 2
    return f"{seeds[0]}–{seeds[-1]}" if whole else ", ".join(map(str, seeds))


MARKS = "<!-- designs -->", "<!-- /designs -->"
HEAD = f"""# Designs A to D

[The protocol](protocol.md) was written before these runs.

{MARKS[0]}{MARKS[1]}
"""


CURVE = 16
"""Points of a cell's curve in designs.json; all rollouts are in the cell's own file below `runs`."""


def thinned(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell whose curve has at most CURVE points: means over as many spans of rollouts, to five digits as the curve's
    own; samples at a span's end."""
    if len(cell.get("curve", {}).get("samples", ())) <= CURVE:
        return cell
    spans = {name: np.array_split(np.array(values, float), CURVE) for name, values in cell["curve"].items()}
    curve = {
        name: [float(f"{s[-1] if name == 'samples' else s.mean():.5g}") for s in parts] for name, parts in spans.items()
    }
    return cell | {"curve": curve}


def write(config: DesignConfig, designs: Mapping[str, Design], record: dict[str, Any], root: Path) -> str:
    """designs.json, tables.md and the figures; the page's section where it is asked for. Returns the tables."""
    pyplot.rcParams.update({"svg.hashsalt": "claim", "font.size": 9, "axes.spines.top": False,
                            "axes.spines.right": False})  # fmt: skip
    out, page = root / config.out, root / "docs" / "results" / "designs.md"
    record["tasks"] = {task: task_record(d) for task, d in designs.items()}
    for task, design in designs.items():
        if "A" in config.designs and any(all_matched(design).values()):
            draw_matched(design, out / f"matched-{task}.svg")
        if record["tasks"][task]["factors"]:
            draw_budgets(design, record["tasks"][task]["factors"], out / f"budgets-{task}.svg")
    kept = record | {"cells": [thinned(cell) for cell in record["cells"]]}
    write_atomic(out / "designs.json", compact(finite_or_none(kept)))
    tables = section(designs, record, ".")
    write_atomic(out / "tables.md", tables)
    if config.page:
        text = section(designs, record, Path(os.path.relpath(out, page.parent)).as_posix())
        if not page.exists():
            write_atomic(page, HEAD)
        put_between(page, MARKS, f"\n{text}")
    return tables


def section(designs: Mapping[str, Design], record: Mapping[str, Any], folder: str) -> str:
    missing = f" {len(record['missing'])} cells had not run." if record["missing"] else ""
    text = [f"`{record['command']}`: {len(record['cells'])} cells, {record['cpu_s']:,.0f} CPU seconds.{missing}"]
    for task, design in designs.items():
        text += task_section(design, record["tasks"][task], folder)
    return "\n\n".join(text) + "\n"


def seconds_by_kind(cells: Mapping[Cell, Mapping[str, Any]]) -> str:
    """Markdown: mean CPU seconds of each kind of cell."""
    kinds: dict[tuple[str, str], list[float]] = {}
    for cell, found in cells.items():
        change = dict(cell.change)
        kind = f"{cell.method}, {n} rollouts" if (n := change.get("iterations")) else cell.method
        kinds.setdefault((cell.task, kind), []).append(found["cpu_s"])
    rows = [[task, kind, f"{mean(v):.0f}", f"{len(v)}"] for (task, kind), v in sorted(kinds.items())]
    return markdown(("task", "cell", "CPU seconds", "cells"), rows)
