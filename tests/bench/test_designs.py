"""Designs A to D: rules that choose rates, what is compared with what, tables, and tiny designs end to end."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from launches import Launch
from loop_helpers import ROOT
from recipe_helpers import flags_of

from bench.claim import design_report
from bench.claim.cells import MORE, TWO_RMS, Cell
from bench.claim.designs import METHODS, Design, DesignConfig, best_within, last_figures
from bench.claim.grid import Grid, make_world
from rto_fast.errors import ConfigError
from rto_fast.logs.files import read_rows

pytestmark = pytest.mark.slow

GAIN = {"PPO": 1.0, "RTO": 1.5, "DDPO": 1.3, "RS-PPO": 1.1, TWO_RMS: 1.2}
"""True reward over sqrt(KL), apart from the seed's own."""


class FakeGrid(Grid):
    """Cells by formulas; nothing is trained.

    KL falls with beta2 and rises with the method's reach; the true reward is (GAIN + the seed's) * sqrt(KL), and in
    design B saturates with the samples, twice as fast for RTO. An oracle critic helps RTO alone.
    """

    def __init__(self, failed: frozenset[tuple[int, str]] = frozenset()) -> None:
        self.found, self.missing, self.failed = {}, set(), failed
        self.trained: list[Cell] = []

    def run(self, title, cells):
        for c in cells:
            self.found.setdefault(Cell(c.task, c.seed), result(Cell(c.task, c.seed), 0.0, 0.0))
            if c not in self.found:
                self.trained.append(c)
                self.found[c] = self.result(c)

    def result(self, c: Cell) -> dict:
        if c.method == "oracle":
            points = [{"kl": float(k), "true_reward": 3 * math.sqrt(k), "ess": 50.0} for k in (0, 1, 2)]
            return {"oracle": dict.fromkeys(("rm", "rm + dpo", "truth"), points), "cpu_s": 1.0, "commit": "abc"}
        if c.method == MORE:
            return {"cpu_s": 1.0, "commit": "abc"}
        if (c.seed, c.method) in self.failed:
            return {"failed": "diverged", "cpu_s": 1.0, "commit": "abc", "seed": c.seed, "method": c.method}
        change = {"beta2": 0.05} | dict(c.change)
        gain = (
            GAIN.get(c.method, 1.0)
            + change.get("extrapolate", 0.0)
            + (0.4 if c.method == "RTO" and "value_samples" in change else 0.0)
        )
        reach = 2.0 if c.method in ("RTO", "DDPO") else 1.0
        kl = reach * 0.3 / change["beta2"] * (c.lr / 1e-3)
        reward = (gain + 0.1 * (c.seed % 10)) * math.sqrt(kl)
        if n := change.get("iterations"):
            reward *= 1 - math.exp(-n / (16 if c.method == "RTO" else 32))
        return result(c, kl, reward)


def result(c: Cell, kl: float, reward: float) -> dict:
    judged = {"true_reward": reward, "kl": kl, "win_rate": 0.5, "length": 20.0}
    score = [0.0] * 7 + [c.lr * 1000]
    return {"method": c.method, "seed": c.seed, "judgement": judged, "cpu_s": 2.0, "commit": "abc",
            "curve": {"score": score, "kl": [0.0] * 7 + [kl]}}  # fmt: skip


def design_of(grid: Grid, task: str = "medium", **settings) -> Design:
    config = DesignConfig(**settings)
    config.validate()
    return Design(config, grid, task)


# Rates


def test_a_rate_is_the_best_score_within_the_kl_bound():
    means = {1: {"score": 1.0, "kl": 4.0}, 2: {"score": 2.0, "kl": 9.0}, 4: {"score": 3.0, "kl": 11.0}}
    assert best_within(means, 10.0) == 2
    assert best_within(means, 12.0) == 4
    assert best_within(means, 3.0) == 1, "none is within: the smallest KL"
    lost = {"score": -math.inf, "kl": math.inf}
    assert best_within({1: lost, 2: means[1]}, 3.0) == 2


def test_figures_of_a_rate_are_of_the_last_rollouts_and_the_end():
    cells = [result(Cell("medium", s, "PPO", 2e-3), kl, 5.0) for s, kl in ((0, 4.0), (1, 6.0))]
    assert last_figures(cells) == {"score": 2.0, "kl": 5.0, "reward": 5.0}
    assert last_figures([*cells, {"failed": "diverged"}])["score"] == -math.inf
    assert last_figures([{}])["kl"] == math.inf


def test_rates_are_chosen_without_the_truth_and_the_truths_stands_beside():
    """The score rises with the rate, and so does the KL; at .05 RTO has 12 nats at .001, PPO 6: PPO can go on to .001,
    not to .002, and RTO stays at .0005. The truth would take the furthest of each."""
    design = design_of(grid := FakeGrid(), designs=("A",))
    design.run()
    chosen = {m: design.choices["A", m, 32] for m in METHODS}
    assert {m: c.rate for m, c in chosen.items()} == {
        "PPO": 1e-3, "RTO": 5e-4, "DDPO": 5e-4, "RS-PPO": 1e-3, TWO_RMS: 1e-3,
    }  # fmt: skip
    assert {c.truth_rate for c in chosen.values()} == {2e-3}
    assert sorted(chosen["RTO"].tried) == [2.5e-4, 5e-4, 1e-3, 2e-3], "one step below the grid's edge"
    assert sorted(chosen["PPO"].tried) == [5e-4, 1e-3, 2e-3]
    tuned = {c.seed for c in grid.trained if dict(c.change).get("beta2") == 0.05 and c.lr == 2e-3}
    assert tuned == {100, 101, 102, 103}, "no seed of the report"


def test_a_single_rate_is_taken_as_it_is():
    design = design_of(FakeGrid(), designs=("A",), learning_rates=(1e-3,))
    design.run()
    assert {c.lr for c in design.grid.trained if c.lr} == {1e-3}


# Cells


def test_design_a_has_the_cells_of_the_protocol():
    grid = FakeGrid()
    design_of(grid, designs=("A",)).run()
    final = [c for c in grid.trained if c.seed >= 200 and c.method != "oracle"]
    assert len(final) == 12 * (2 * 5 + 3 * 3) == 228
    assert {c.seed for c in final} == set(range(200, 212))
    penalties = {m: {dict(c.change)["beta2"] for c in final if c.method == m} for m in METHODS}
    assert penalties["PPO"] == penalties["RTO"] == {0.0125, 0.025, 0.05, 0.1, 0.2}
    assert penalties["DDPO"] == penalties["RS-PPO"] == penalties[TWO_RMS] == {0.025, 0.05, 0.1}
    assert len([c for c in grid.trained if c.method == "oracle"]) == 12


def test_the_designs_share_cells_and_keep_their_own_rates():
    grid = FakeGrid()
    design = design_of(grid)
    design.run()
    assert len({c.name for c in grid.trained}) == len(grid.trained), "a cell has a file of its own"
    assert len(design.choices["A", "RTO", 32].tried) >= 3
    same = design.cell(200, "RTO", 5e-4, 0.05, 32)
    assert same == design.matched_cell(200, "RTO", 0.05) == design.budget_cell(200, "RTO", 0.05, 32)
    budgets = {dict(c.change).get("iterations", 32) for c in grid.trained if c.seed == 200 and c.method == "RTO"}
    assert budgets == {4, 8, 16, 32, 64, 128}
    first = next(i for i, c in enumerate(grid.trained) if dict(c.change).get("iterations") == 128)
    assert all(dict(c.change).get("iterations") != 64 for c in grid.trained[:first]), "the longest are started first"


def test_tasks_in_small():
    grid = FakeGrid()
    design = design_of(grid, "stories-rule")
    design.run()
    assert {c.seed for c in grid.trained} == {100, 101, 200, 201, 202, 203}
    assert {dict(c.change)["beta2"] for c in grid.trained if (c.seed, c.method) == (200, "PPO")} == {0.025, 0.05, 0.1}
    assert max(c.lr for c in grid.trained) <= 2e-3
    assert 3e-4 in design.choices["A", "PPO", 32].tried, "the stories' own rates"
    assert design.kl_levels == (12.0, 18.0, 24.0, 30.0), "their responses are three times as long"
    assert design.choices["A", "RTO", 32].rate == 2e-3, "24 nats are within their bound"
    assert {c.method for c in grid.trained if c.lr} == {"PPO", "RTO", "DDPO"}
    rows = design_report.contrasts(design)
    assert [r["name"] for r in rows] == ["RTO − PPO", "credit: RTO − DDPO"]
    assert "RS-PPO" not in design_report.method_table(design)
    assert design_of(FakeGrid(), "whole").scale.methods == METHODS


def test_in_small_a_method_that_stays_near_gets_weaker_penalties_and_the_main_task_has_its_own():
    """KL is .3 / beta2 times the rate: PPO at .0005 ends at 6 nats on .025, RTO at 12."""
    design = design_of(grid := FakeGrid(), "whole", designs=("A",), learning_rates=(5e-4,))
    design.run()
    assert design.penalties("RTO") == (0.025, 0.05, 0.1)
    assert design.penalties("PPO") == (0.0125, 0.025, 0.05, 0.1)
    assert {dict(c.change)["beta2"] for c in grid.trained if (c.seed, c.method) == (200, "PPO")} == {
        *design.penalties("PPO")
    }
    assert all(len(r["over"]) == 4 for r in design_report.contrasts(design))
    assert "| PPO | 0.0125 |" in design_report.method_table(design)

    nearer = design_of(FakeGrid(), "whole", designs=("A",), learning_rates=(1e-5,))
    nearer.run()
    assert nearer.penalties("PPO") == (0.00625, 0.0125, 0.025, 0.05, 0.1), "twice and no more"
    main = design_of(FakeGrid(), designs=("A",), learning_rates=(1e-5,))
    main.run()
    assert main.penalties("PPO") == main.scale.penalties("PPO")


def test_the_factor_is_decided_on_the_main_task_alone():
    rows = [{"held": False, "share": 0.95, "factor": 2.0, "low": 1.0, "high": 3.0, "seeds": 4}]
    assert "refuted" in design_report.factor_table(rows, True)
    assert "refuted" not in design_report.factor_table(rows, False)


def test_curves_in_the_record_are_means_over_spans():
    cell = {"curve": {"samples": [64.0 * (i + 1) for i in range(32)], "kl": [float(i) for i in range(32)]}, "seed": 200}
    curve = design_report.thinned(cell)["curve"]
    assert curve["samples"] == [128.0 * (i + 1) for i in range(16)]
    assert curve["kl"] == [2 * i + 0.5 for i in range(16)]
    short = {"curve": {"samples": [64.0], "kl": [1.0]}}
    assert design_report.thinned(short) is short
    assert design_report.thinned({"failed": "diverged"}) == {"failed": "diverged"}


# Comparisons


def test_contrasts_at_equal_kl_are_the_gains_that_were_put_in():
    design = design_of(FakeGrid(), designs=("A",), seeds=(200, 201, 202), kl_levels=(4.0, 9.0), kl_range=(3.0, 5.0))
    design.run()
    rows = {r["name"]: r for r in design_report.contrasts(design)}
    expected = {"RTO − PPO": 0.5, "credit: RTO − DDPO": 0.2, "credit: RS-PPO − PPO": 0.1,
                "second opinion: DDPO − PPO on two RMs": 0.1}  # fmt: skip
    for name, gain in expected.items():
        assert rows[name]["at"][4.0] == pytest.approx(dict.fromkeys((200, 201, 202), gain * 2)), name
        middle = rows[name]["over"][200]
        assert gain * math.sqrt(3) < middle < gain * math.sqrt(5)
        assert rows[name]["p"] == 2 / 8, "three seeds, all of one sign"
        assert rows[name]["holm"] == 1.0, "four times .25"
    table = design_report.contrast_table(design, list(rows.values()))
    assert "| RTO − PPO | +1.00 ± 0.00 | +1.50 ± 0.00 | +1.00 ± 0.00 | 0.250 | 1.000 | unresolved |" in table


def test_a_collapsed_run_does_not_count_where_no_curve_falls():
    """PPO's furthest run on one seed collapses to its SFT model's reward: the mean difference grows, the median and the
    curves that never fall keep near what they were."""
    settings = {"designs": ("A",), "seeds": (200, 201, 202), "kl_range": (3.0, 5.0)}
    design = design_of(FakeGrid(), **settings)
    design.run()
    whole = design_report.contrasts(design)[0]
    design = design_of(grid := FakeGrid(), **settings)
    design.run()
    near = max(kl for kl, _ in design.matched("PPO")[201] if kl < 5)
    for beta2 in design.scale.penalties("PPO"):
        cell = design.matched_cell(201, "PPO", beta2)
        if grid.found[cell]["judgement"]["kl"] > near:
            grid.found[cell]["judgement"]["true_reward"] = 0.0
    fallen = design_report.contrasts(design)[0]
    assert whole["best"] == pytest.approx(whole["over"]), "no curve falls"
    assert fallen["over"][201] > whole["over"][201] + 0.1
    assert fallen["best"][201] < fallen["over"][201] - 0.1
    assert {s: fallen["best"][s] for s in (200, 202)} == {s: whole["over"][s] for s in (200, 202)}
    assert "| RTO − PPO |" in design_report.collapse_table(design, [fallen])
    assert f"{np.median(list(fallen['over'].values())):+.2f} | 3 of 3" in design_report.collapse_table(design, [fallen])


def test_a_seed_without_a_model_is_left_out_and_counted():
    design = design_of(FakeGrid(frozenset({(201, "PPO")})), designs=("A",), seeds=(200, 201, 202))
    design.run()
    row = design_report.contrasts(design)[0]
    assert set(row["at"][4.0]) == {200, 202}
    assert "(2)" in design_report.contrast_table(design, [row])


def test_only_the_main_tasks_contrasts_are_hypotheses():
    design = design_of(FakeGrid(), "whole", designs=("A",))
    design.run()
    rows = design_report.contrasts(design)
    assert {r["holm"] for r in rows} == {None}
    assert "Holm" not in design_report.contrast_table(design, rows)


def test_factors_with_and_without_ppos_kl():
    """At one rate for all, RTO learns in half of PPO's samples and has 1.5 times its gain, and twice its KL."""
    settings = {"designs": ("B",), "learning_rates": (1e-3,), "budget_seeds": (200, 210), "draws": 50}
    design = design_of(FakeGrid(), **settings)
    design.run()
    rows = {(r["held"], r["share"]): r for r in design_report.factors(design)}
    free, held = rows[False, 0.75]["factor"], rows[True, 0.75]["factor"]
    assert free > held > 1, "further from SFT is more than faster"
    ppo, rto = design.curves(held=True)
    for theirs, ours in zip(ppo, rto, strict=True):
        for (n, a), (_, b) in zip(theirs[1:], ours[1:], strict=True):
            if n != 2048:  # the fake's full run has no saturation
                speed = (1 - math.exp(-n / 64 / 16)) / (1 - math.exp(-n / 64 / 32))
                assert b == pytest.approx(1.5 * a * speed, rel=1e-6), "at PPO's own KL"
    assert "refuted" in design_report.factor_table(list(rows.values()), True)


def test_design_c_changes_one_part_of_design_as_cells():
    grid = FakeGrid()
    design_of(grid, designs=("A",)).run()
    before = len(grid.trained)
    both = design_of(grid, designs=("A", "C"))
    both.run()
    new = grid.trained[before:]
    assert len(new) == 4 * 2 * (3 + 3 + 3 + 2), "the first row is design A's; PPO has no DPO model"
    assert {c.seed for c in new} == {200, 201, 202, 203}
    assert {c for c in grid.found if c.task == "medium-250"} == {Cell("medium-250", s) for s in range(200, 204)}
    plain = {replace(c, change=c.change[:1]) for c in new}
    assert plain <= {*grid.trained[:before]}, "rates and penalties are A's"
    assert len({c.change[1:] for c in new}) == 5

    rows = {r["name"]: r["over"] for r in design_report.ablated(both)}
    gain, helped = (mean(rows[name]["RTO − PPO"].values()) for name in ("as in design A",
                                                                        "oracle critic, 2 continuations"))  # fmt: skip
    assert helped == pytest.approx(gain * 0.9 / 0.5)
    assert rows["oracle critic, 2 continuations"]["DDPO − PPO"] == rows["as in design A"]["DDPO − PPO"]
    assert "| no critic | +" in design_report.ablation_table(both, design_report.ablated(both))


def test_design_c_alone_tunes_its_methods_and_other_tasks_have_none():
    grid = FakeGrid()
    design_of(grid, designs=("C",)).run()
    assert {c.method for c in grid.trained if c.seed < 200} == {"PPO", "RTO", "DDPO"}
    assert not design_of(grid, "whole", designs=("C",)).ablations


def test_design_d_has_a_row_for_each_variant_at_the_methods_rate():
    grid = FakeGrid()
    design = design_of(grid, designs=("A", "D"))
    design.run()
    assert [c.seed for c in grid.trained if c.method == MORE] == [200, 201, 202, 203]
    rows = {r["name"]: r for r in design_report.system_rows(design)}
    assert all(len(r["found"]) == 4 for r in rows.values())
    gain = rows["RTO, rounds extrapolated by 0.3"]["differences"]
    kl = rows["RTO"]["found"][200][0]
    assert gain == pytest.approx(dict.fromkeys(range(200, 204), 0.3 * math.sqrt(kl))), "paired with RTO by seed"
    assert rows["RTO"]["differences"] == {}
    rates = {(c.method, c.lr) for c in grid.trained if c.seed == 203 and len(c.change) != 1 and c.method != "oracle"}
    assert ("RTO", design.choices["A", "RTO", 32].rate) in rates
    assert ("MPO", 5e-4) in rates
    assert "| MPO, no reference | " in design_report.system_table(design, design_report.system_rows(design))


def test_verdicts():
    assert design_report.verdict(1.2, 3.0) == "refuted"
    assert design_report.verdict(1.2, 9.0) == "unresolved"
    assert design_report.verdict(8.5, 9.0) == "reached"
    assert design_report.verdict(math.nan, math.nan) == "no plateau"


@pytest.mark.parametrize(("values", "p", "says"), [
    ([0.1, 0.2, 0.3], 0.04, "supported"), ([-0.1, -0.2, -0.3], 0.04, "reversed"),
    ([0.1, 0.2, 0.1], 0.06, "smaller than 0.5"), ([-0.2, 0.9, 0.3], 0.06, "unresolved"), ([0.1], 1.0, "unresolved"),
])  # fmt: skip
def test_decisions(values, p, says):
    assert design_report.decision(values, p) == says


def test_a_small_p_is_not_shown_as_none():
    assert [design_report.p_value(p) for p in (2 / 4096, 0.001, 0.25, 1.0, math.nan)] == [
        "< 0.001", "0.001", "0.250", "1.000", "",
    ]  # fmt: skip


def test_the_page_keeps_what_stands_around_its_section(tmp_path):
    page = tmp_path / "docs" / "results" / "designs.md"
    page.parent.mkdir(parents=True)
    design = design_of(FakeGrid(), designs=("A",), seeds=(200, 201, 202), page=True, out="results")
    design.run()
    record = {"cells": [], "missing": [], "command": "make claim", "cpu_s": 1.0}
    design_report.write(design.config, {"medium": design}, dict(record), tmp_path)
    first = page.read_text()
    assert "| RTO − PPO |" in first
    assert "## medium" in first
    page.write_text("Before.\n\n" + first + "\nBehind.\n")
    design_report.write(design.config, {"medium": design}, dict(record), tmp_path)
    assert page.read_text() == "Before.\n\n" + first + "\nBehind.\n"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tasks": ("easy",)}, "tasks: unknown easy"),
        ({"designs": ()}, "designs: at least one"),
        ({"tuning_seeds": (200,)}, r"tuning_seeds: \[200\] are reported too"),
        ({"budget_tuning_seeds": (205,)}, r"tuning_seeds: \[205\] are reported too"),
        ({"budgets": (100,)}, r"budgets: \[100\] are no multiples"),
        ({"eval_prompts": 0}, "eval_prompts: must be positive, got 0"),
        ({"oracle_samples": (0, 8)}, "oracle_samples: must be positive"),
        ({"value_samples": 0}, "value_samples: must be at least 1"),
        ({"ablation_seeds": (100,)}, r"tuning_seeds: \[100\] are reported too"),
        ({"few_beta2": (0.1,)}, "few_beta2: 0.05, where rates are tuned"),
        ({"beta2": (0.0, 0.05)}, "beta2: positive numbers"),
        ({"kl_range": (5.0, 3.0)}, "kl_range: the lower end first"),
    ],
)
def test_settings_that_cannot_work(setting, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(DesignConfig(), **setting).validate()


# End to end

TINY = {
    "seeds": (200, 201), "budget_seeds": (200, 201), "tuning_seeds": 100, "budget_tuning_seeds": 100,
    "learning_rates": 1e-3, "iterations": 1, "budgets": (64, 128), "beta2": (0.05, 0.1), "few_beta2": 0.05,
    "corpus_rows": 320, "pairs": 96, "eval_prompts": 32, "oracle_samples": (4, 64), "tasks": "medium",
    "kl_levels": 0.001, "kl_range": (0.0, 0.002), "draws": 20, "workers": 1, "designs": ("A", "B"),
}  # fmt: skip


def command_of(folder: Path, **settings) -> list[str]:
    return ["-m", "bench.claim", *flags_of(TINY | {"runs": folder, "out": folder / "out"} | settings)]


@pytest.fixture(scope="module")
def designs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("designs")
    found = Launch(command_of(folder), ranks=1, log=folder / "log").wait(900)
    assert found.returncode == 0, found.output
    return folder


def run_here(monkeypatch: pytest.MonkeyPatch, folder: Path, **settings) -> int:
    """The command in this process, where no cell is left to be trained; its exit code."""
    monkeypatch.setattr(sys, "argv", command_of(folder, **settings)[1:])
    try:
        runpy.run_path(str(ROOT / "bench" / "claim" / "__main__.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


def test_one_command_trains_compares_and_draws(designs):
    record = json.loads((designs / "out" / "designs.json").read_text())
    assert record["missing"] == []
    methods = {c["method"] for c in record["cells"] if c["seed"] == 200}
    assert methods == {"SFT", "oracle", *METHODS}
    found = {(c["method"], tuple(map(tuple, c["change"]))): c for c in record["cells"] if c["seed"] == 200}
    same_start = {c["curve"]["reward"][0] for c in found.values() if c.get("curve")}
    assert len(same_start) == 1, "the first rollouts are the same samples"
    second = found[TWO_RMS, (("beta2", 0.05),)]["curve"]["score"][0]
    assert second != found["PPO", (("beta2", 0.05),)]["curve"]["score"][0], "scored by both reward models"
    assert found["RTO", (("beta2", 0.05), ("iterations", 2))]["curve"]["samples"] == [64, 128]
    assert len(record["tasks"]["medium"]["contrasts"]) == 4
    assert {f["held"] for f in record["tasks"]["medium"]["factors"]} == {True, False}
    for name in ("matched-medium.svg", "budgets-medium.svg"):
        assert "<svg" in (designs / "out" / name).read_text()
    assert "SFT, tilted by the RM" in (designs / "out" / "matched-medium.svg").read_text(), (
        "the oracle is in the figure"
    )
    tables = (designs / "out" / "tables.md").read_text()
    for words in ("second opinion: DDPO", "of PPO's highest", "cells, ", "the truth's rate"):
        assert words in tables


def test_run_again_trains_nothing(designs, monkeypatch):
    cells = {p: p.stat().st_mtime_ns for p in designs.rglob("*.json") if p.parent.name.startswith("seed")}
    before = json.loads((designs / "out" / "designs.json").read_text())
    assert run_here(monkeypatch, designs) == 0
    assert {p: p.stat().st_mtime_ns for p in cells} == cells
    assert json.loads((designs / "out" / "designs.json").read_text()) == before


def test_more_dpo_models_differ_from_the_first(designs):
    """One by its seed alone, one by pairs that the first one sampled."""
    settings = DesignConfig(**{k: TINY[k] for k in ("iterations", "corpus_rows", "pairs", "eval_prompts")})
    world = make_world(designs, settings, "medium", 200)
    world.prepare_more()
    weights = [(world.root / name / "model" / "model.safetensors").read_bytes() for name in ("dpo", "dpo_b", "dpo2")]
    assert len({*weights}) == 3
    first, second = (read_rows(world.root / "pairs" / name) for name in ("pairs.jsonl", "pairs2.jsonl"))
    assert len(second) > len(first) / 2
    assert not {r["chosen"] for r in first} >= {r["chosen"] for r in second}


def test_report_of_what_is_there(designs, tmp_path, monkeypatch):
    """A seed more: nothing is trained, and the report says how much is missing."""
    assert run_here(monkeypatch, designs, seeds=(200, 201, 202), out=tmp_path, report_only=()) == 0
    record = json.loads((tmp_path / "designs.json").read_text())
    assert "medium/seed202/SFT" in record["missing"]
    assert f"{len(record['missing'])} cells had not run" in (tmp_path / "tables.md").read_text()


def test_bad_settings_end_in_one_line(designs, monkeypatch, capsys):
    assert run_here(monkeypatch, designs, tasks="easy") == 2
    assert capsys.readouterr().err.startswith("error: tasks: unknown easy; choose from medium, whole")
