"""The claim's experiment: its statistics and tables with known numbers, its settings, and a tiny grid end to end."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from launches import Launch
from loop_helpers import ROOT
from recipe_helpers import flags_of

from bench.claim import cells, report, stories
from bench.claim.cells import PAYS_TOKENS, RL, TWO_RMS, Cell, TinyWorld, correlation, rl_settings, run_cell, second_rm
from bench.claim.grid import QUICK, ClaimConfig, Grid, quickened
from bench.claim.report import Results
from rto_fast.demo.config import DemoConfig
from rto_fast.demo.pipeline import rm_config
from rto_fast.errors import ConfigError
from rto_fast.logs.files import read_rows

pytestmark = pytest.mark.slow


def cell(method: str, seed: int, reward: float, lr: float = 1e-3, part: int = 1, change: tuple = (), **more) -> dict:
    judged = {"true_reward": reward, "kl": 2.0 * reward, "win_rate": 0.75, "length": 30.4}
    curve = (
        {}
        if method in ("SFT", "DPO")
        else {"curve": {"samples": [64.0, 128.0], "kl": [0.0, 1.0], "reward": [0.0, reward]}}
    )
    quality = {"quality": {"rm": 0.5, "dpo": 0.25}} if method == "SFT" else {}
    rate = 0.0 if method == "SFT" else lr
    return {"task": "medium", "seed": seed, "method": method, "lr": rate, "part": part,
            "change": [list(c) for c in change], "judgement": judged} | curve | quality | more  # fmt: skip


@pytest.fixture
def record() -> dict:
    cells = [cell("SFT", s, 0.0) for s in (0, 1)]
    cells += [cell("DPO", 0, 1.0), cell("DPO", 1, 2.0)]
    cells += [cell("PPO", 0, 1.0), cell("PPO", 1, 2.0), cell("PPO", 0, 9.0, lr=5e-4), cell("PPO", 0, 0.5, part=4)]
    cells += [cell("RTO", 0, 4.0), cell("RTO", 1, 5.5), cell("RTO", 0, 0.25, part=4)]
    cells += [cell("RTO", 0, 3.0, change=(("beta2", 0.1),))]
    failed = cell("DDPO", 0, 0.0)
    del failed["judgement"]
    settings = {"seeds": [0, 1], "tuning_seeds": [100], "ablation_seeds": [0], "pairs": 1000, "eval_prompts": 64,
                "fractions": [4]}  # fmt: skip
    rates = {"medium": dict.fromkeys(("DPO", "PPO", "RTO", "DDPO"), 1e-3)}
    return {
        "command": "python -m bench.claim.grid",
        "settings": settings,
        "learning_rates": rates,
        "cells": [*cells, failed],
        "missing": [],
    }


def test_main_table(record):
    lines = report.main_table(Results(record)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| SFT", "| DPO", "| PPO", "| **RTO**"], (
        "diverged runs are no row"
    )
    assert lines[4] == "| PPO | 0.001 | 1.50 ± 6.35 |  | 75 % | 3.0 | 30 | 2 |"
    assert lines[5] == "| **RTO** | 0.001 | 4.75 ± 9.53 | +3.25 ± 3.18 | 75 % | 9.5 | 30 | 2 |"


def test_the_other_tables(record):
    results = Results(record)
    assert report.fraction_table(results).splitlines()[2] == "| 1/4 | 32 | 0.50 | 0.25 | -0.25 |"
    assert report.task_table(results).splitlines()[2].startswith("| medium | 0.50, 0.25 | 0.00 ± 0.00 | 1.50 ±")
    assert report.ablation_table(results).splitlines()[2:] == [
        "| PPO | as above | 1.00 | 2.0 | 75 % | 1 |",
        "| RTO | as above | 4.00 | 8.0 | 75 % | 1 |",
        "| RTO | beta2 0.1 | 3.00 | 6.0 | 75 % | 1 |",
    ]


def test_a_page_without_its_marks_is_named(tmp_path):
    page, marks = tmp_path / "claim.md", ("<!-- a -->", "<!-- /a -->")
    for text in ("no mark", "<!-- a -->\n", "<!-- a --><!-- /a --><!-- a --><!-- /a -->"):
        page.write_text(text)
        with pytest.raises(ConfigError, match=r"page: .*claim.md must have <!-- a --> and <!-- /a --> once each"):
            report.put_between(page, marks, "made")
        assert page.read_text() == text
    page.write_text("x<!-- a -->old<!-- /a -->y")
    report.put_between(page, marks, "made")
    assert page.read_text() == "x<!-- a -->made<!-- /a -->y"


def test_the_section_stands_between_its_marks(record, tmp_path):
    from rich.console import Console

    page = tmp_path / "docs" / "claim.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- claim -->\nold\n<!-- /claim -->\nafter\n")
    for _ in range(2):
        report.write(record, tmp_path / "out", page, Console(quiet=True))
    text = page.read_text()
    assert "](../out/curves.svg)" in text
    assert text.startswith("before\n<!-- claim -->\n`python -m bench.claim.grid`, seeds 0, 1")
    assert text.endswith("<!-- /claim -->\nafter\n")
    assert "old" not in text
    assert json.loads((tmp_path / "out" / "claim.json").read_text()) == record
    for name in ("curves.svg", "scale.svg"):
        svg = (tmp_path / "out" / name).read_text()
        assert "<svg" in svg
        assert len(svg) < 400_000


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tuning_seeds": (0,)}, r"tuning_seeds: \[0\] are reported too"),
        ({"methods": ("SFT", "PPO", "RTO", "XPO")}, "methods: unknown XPO"),
        ({"methods": ("SFT", "PPO")}, "methods: SFT, PPO and RTO"),
        ({"parts": ("all",)}, "parts: unknown all"),
        ({"iterations": 24}, "fractions: 1/16 of 24"),
        ({"seeds": ()}, "seeds: at least one"),
        ({"fractions": (0,)}, "fractions: must be positive"),
        ({"pairs": 0}, "pairs: must be positive, got 0"),
        ({"workers": -1}, "workers: must not be negative, got -1"),
        ({"oracle_samples": (32, 0)}, "oracle_samples: must be positive, got"),
    ],
)
def test_settings_that_cannot_work(setting, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(ClaimConfig(), **setting).validate()


def test_quick_keeps_what_is_given():
    config = quickened(ClaimConfig(iterations=8, quick=True))
    assert config.iterations == 8
    assert config.seeds == QUICK["seeds"]
    config.validate()


@pytest.mark.parametrize("method", RL)
def test_methods_differ_from_ppo_in_what_they_are(method, tmp_path):
    """Same reward model, prompts, responses a rollout, rates and schedule; all settings are valid."""
    world = TinyWorld(tmp_path, DemoConfig(output_dir=str(tmp_path)))
    ppo, ours = (rl_settings(world, Cell("medium", 0, m, 1e-3), tmp_path) for m in ("PPO", method))
    ours.validate()
    differ = {k for k, v in dataclasses.asdict(ours).items() if v != getattr(ppo, k)}
    token_reward = {"beta1", "dpo_model"} if method in PAYS_TOKENS else set()
    second = {"reward_model"} if method == TWO_RMS else set()
    assert differ - {"rollout_batch"} == token_reward | second | set(RL[method])
    assert ours.responses == ppo.responses


def test_two_reward_models_differ_in_their_seed_alone(tmp_path):
    world = TinyWorld(tmp_path, DemoConfig(output_dir=str(tmp_path)))
    one, two = (rl_settings(world, Cell("medium", 0, m, 1e-3), tmp_path).reward_model for m in ("PPO", TWO_RMS))
    assert two == (*one, str(tmp_path / "rm2" / "model"))
    first = rm_config(world.config, tmp_path)
    second = dataclasses.asdict(second_rm(first))
    differ = {k: v for k, v in second.items() if v != getattr(first, k)}
    assert differ == {"seed": 10_000, "output_dir": str(tmp_path / "rm2")}


def test_design_cs_changes_are_the_runs_settings(tmp_path, monkeypatch):
    world = TinyWorld(tmp_path / "medium" / "seed3" / "world", DemoConfig(output_dir=str(tmp_path)))

    def settings(method, **change):
        ours = rl_settings(world, Cell("medium", 3, method, 1e-3, change=tuple(change.items())), tmp_path)
        ours.validate()
        return ours

    plain, poor = settings("RTO"), str(tmp_path / "medium-250" / "seed3" / "world")
    assert settings("RTO", rm_pairs=250) == dataclasses.replace(plain, reward_model=(f"{poor}/rm/model",))
    assert settings("RTO", dpo_pairs=250) == dataclasses.replace(plain, dpo_model=(f"{poor}/dpo/model",))
    assert settings("RTO", value_samples=4) == plain
    ours = [str(world.root / name / "model") for name in ("dpo", "dpo_b", "dpo2")]
    two = settings("RTO", dpo_models=2, dpo_pessimism=0.5)
    assert two == dataclasses.replace(plain, dpo_model=tuple(ours[:2]), dpo_pessimism=0.5)
    assert settings("RTO", round=2) == dataclasses.replace(plain, dpo_model=(ours[2],))
    further = settings("RTO", extrapolate=0.3)
    assert further == dataclasses.replace(plain, dpo_model=(ours[2], ours[0]), dpo_weight=(1.3, -0.3))
    group = {"responses_per_prompt": 4, "rollout_batch": 16}
    ours = settings("RTO", responses_per_prompt=4, advantage="q")
    assert ours == dataclasses.replace(plain, advantage="q", **group), "as many responses as the others"

    asked = []
    monkeypatch.setattr(cells.trainer, "train", lambda *given: asked.append(given))
    monkeypatch.setattr(cells, "read_metrics", lambda path: [])
    for change in ((), (("value_samples", 4),)):
        cells.train(world, Cell("medium", 3, "RTO", 1e-3, change=change), tmp_path)
    assert asked[0][2] is None
    assert asked[1][2].func is cells.monte_carlo.values
    assert asked[1][2].keywords == {"samples": 4}


def test_a_share_of_the_samples_has_its_own_schedule(tmp_path):
    world = TinyWorld(tmp_path, DemoConfig(output_dir=str(tmp_path), iterations=32))
    assert rl_settings(world, Cell("medium", 0, "RTO", 1e-3, part=16), tmp_path).iterations == 2
    longer = Cell("medium", 0, "RTO", 1e-3, change=(("beta2", 0.1), ("iterations", 128)))
    assert rl_settings(world, longer, tmp_path).iterations == 128


class FakeGrid(Grid):
    """Rewards by a function of the learning rate; nothing is trained."""

    def __init__(self, reward) -> None:
        self.found, self.of = {}, reward

    def run(self, title, cells):
        for c in cells:
            value = self.of(c)
            judged = {"failed": "diverged"} if value is None else {"judgement": {"true_reward": value}}
            self.found[c] = judged


def test_tuning_takes_the_best_mean_and_steps_beyond_the_grid():
    rewards = {
        "PPO": {1: 0.0, 2: 5.0, 4: 1.0},
        "RTO": {1: 0.0, 2: 1.0, 4: 2.0, 8: 3.0, 16: 4.0},
        "DPO": {1: 1, 2: 0, 4: 0, 0.5: 9},
    }
    grid = FakeGrid(lambda c: rewards[c.method][c.lr] + c.seed)
    assert grid.tune("medium", ("SFT", "PPO", "RTO", "DPO"), (100, 101), (1, 2, 4)) == {"PPO": 2, "RTO": 8, "DPO": 0.5}
    assert max(c.lr for c in grid.found if c.method == "RTO") == 8, "one step, no more"
    assert {c.lr for c in grid.found if c.method == "PPO"} == {1, 2, 4}


def test_a_rate_that_diverges_is_not_chosen():
    grid = FakeGrid(lambda c: None if c.lr == 4 and c.seed == 101 else c.lr)
    assert grid.tune("medium", ("PPO",), (100, 101), (1, 2, 4)) == {"PPO": 2}


def test_correlation():
    import torch

    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert correlation(a, 3 - 2 * a) == pytest.approx(-1)
    assert correlation(a, torch.tensor([1.0, -1.0, -1.0, 1.0])) == pytest.approx(0, abs=1e-12)


TINY = {
    "seeds": 0, "learning_rates": 1e-3, "iterations": 2, "fractions": 2, "oracle_samples": (8, 64),
    "corpus_rows": 320, "pairs": 96,
    "eval_prompts": 32, "workers": 1,
}  # fmt: skip


def command_of(folder: Path, **settings) -> list[str]:
    return ["-m", "bench.claim.grid", "--quick", *flags_of(TINY | {"runs": folder, "out": folder / "out"} | settings)]


def run_claim_here(monkeypatch: pytest.MonkeyPatch, folder: Path, **settings) -> int:
    """The command in this process, where no cell is left to be trained; its exit code."""
    monkeypatch.setattr(sys, "argv", command_of(folder, **settings)[1:])
    try:
        runpy.run_path(str(ROOT / "bench" / "claim" / "grid.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claim")
    result = Launch(command_of(folder), ranks=1, log=folder / "log").wait(580)
    assert result.returncode == 0, result.output
    return folder


def test_quick_grid_end_to_end(grid):
    record = json.loads((grid / "out" / "claim.json").read_text())
    assert record["command"].startswith("python -m bench.claim.grid --quick")
    judged = {(c["method"], c["seed"], c["part"]): c for c in record["cells"] if "judgement" in c}
    assert {k[0] for k in judged if k[1] == 0} == {"SFT", "DPO", "PPO", "RTO"}
    assert judged["SFT", 0, 1]["judgement"]["win_rate"] == 0.5
    assert set(judged["SFT", 0, 1]["quality"]) == {"rm", "rm2", "rm_rm2", "dpo", "dpo_paid", "dpo_token"}
    ppo, rto = (judged[m, 0, 1] for m in ("PPO", "RTO"))
    assert ppo["curve"]["samples"] == rto["curve"]["samples"] == [64, 128]
    assert ppo["curve"]["reward"][0] == rto["curve"]["reward"][0], "the first rollouts are the same samples"
    assert ppo["judgement"] != rto["judgement"]
    assert judged["RTO", 0, 2]["curve"]["samples"] == [64]
    assert len([p for p in (grid / "out").iterdir() if p.suffix == ".svg"]) == 2
    [oracle] = [c for c in record["cells"] if c["method"] == "oracle"]
    assert set(oracle["oracle"]) == {"rm", "rm + dpo", "truth"}
    ends = {name: points[-1]["true_reward"] for name, points in oracle["oracle"].items()}
    assert ends["truth"] == max(ends.values())
    assert oracle["oracle"]["rm"][0]["kl"] == pytest.approx(0, abs=1e-9)
    assert "SFT, tilted by the RM" in (grid / "out" / "curves.svg").read_text()
    assert "its clipped sum, as paid" in (grid / "out" / "tables.md").read_text()
    assert re.search(r"\| \*\*RTO\*\* \| 0\.00\d+ \| -?\d+\.\d\d ", (grid / "out" / "tables.md").read_text())


def test_report_of_what_is_there(grid, tmp_path, monkeypatch):
    """A grid with a seed more: nothing is trained, and the report says what is missing."""
    assert run_claim_here(monkeypatch, grid, seeds=(0, 1), out=tmp_path, report_only=()) == 0
    record = json.loads((tmp_path / "claim.json").read_text())
    assert "--report-only" not in record["command"]
    assert "medium/seed1/SFT" in record["missing"]
    assert {c["seed"] for c in record["cells"]} == {0, 100}
    assert f"{len(record['missing'])} cells of the grid had not run" in (tmp_path / "tables.md").read_text()


def test_run_again_trains_nothing(grid, monkeypatch):
    cells = {p: p.stat().st_mtime_ns for p in grid.rglob("*.json") if p.parent.name.startswith("seed")}
    before = json.loads((grid / "out" / "claim.json").read_text())
    assert run_claim_here(monkeypatch, grid) == 0
    assert {p: p.stat().st_mtime_ns for p in cells} == cells
    assert json.loads((grid / "out" / "claim.json").read_text()) == before


def test_a_cell_knows_nothing_of_the_cells_before_it(grid, tmp_path, one_rank):
    """Trained alone in this process: the figures of the grid, where one process ran all cells."""
    import torch

    torch.set_num_threads(1)
    there = json.loads(next((grid / "medium" / "seed0").glob("RTO_lr*_part2.json")).read_text())
    settings = DemoConfig(
        output_dir=str(grid / "medium" / "seed0" / "world"), seed=0,
        **{k: TINY[k] for k in ("corpus_rows", "pairs", "eval_prompts", "iterations")},
    )  # fmt: skip
    world = TinyWorld(Path(settings.output_dir), settings)
    alone = run_cell(Cell("medium", 0, "RTO", there["lr"], part=2), lambda task, seed: world, tmp_path, "")
    assert alone["judgement"] == there["judgement"]
    assert alone["curve"] == there["curve"]


def test_no_prompt_that_models_are_judged_on_is_in_a_training_set(grid, one_rank):
    root = grid / "medium" / "seed0" / "world"
    world = TinyWorld(root, DemoConfig(output_dir=str(root), seed=0, eval_prompts=TINY["eval_prompts"]))
    asked = {world.task.tokenizer.decode(p, skip_special_tokens=True) for p in world.judge_one.base.prompts()}
    assert len(asked) > TINY["eval_prompts"] / 2
    for file in ("data/corpus", "data/prompts", "pairs/pairs"):
        seen = {r["prompt"] for r in read_rows(root / f"{file}.jsonl")}
        assert len(seen) > 50, "openings as the tokenizer writes them"
        assert all(world.task.tokenizer.decode(world.task.encode(p)) == p for p in seen)
        assert not asked & seen, file


def test_runs_that_were_judged_on_seen_openings_are_refused(grid, monkeypatch, capsys):
    sizes = json.loads((grid / "sizes.json").read_text())
    old = {k: v for k, v in sizes.items() if k != "held_out"}
    (grid / "sizes.json").write_text(json.dumps(old))
    try:
        assert run_claim_here(monkeypatch, grid) == 2
        assert "held_out=None (now 4)" in capsys.readouterr().err
    finally:
        (grid / "sizes.json").write_text(json.dumps(sizes))


def test_other_sizes_are_refused(grid, monkeypatch, capsys):
    assert run_claim_here(monkeypatch, grid, pairs=97) == 2
    assert "pairs=96 (now 97)" in capsys.readouterr().err


def test_story_rule():
    assert stories.story_reward("The bird saw a tree. The Bird, and a tree!") == 2
    assert stories.story_reward("Mom and the girl had a dog. Cathy sang.") == -1
    assert stories.story_reward("") == 0


def test_story_is_cut_behind_a_sentence():
    assert stories.whole_sentences('He sat. "Go!" she said') == 'He sat. "Go!"'
    assert stories.whole_sentences("no end") == ""
    assert stories.whole_sentences("One. " + "b" * 200 + ".") == "One."


@pytest.mark.skipif(not stories.available(), reason=f"no {stories.MODEL}")
@pytest.mark.parametrize("task", stories.TASKS)
def test_story_world(task, tmp_path, monkeypatch, one_rank):
    """Trained on a few rows: parts are disjoint, all parts are there, RTO runs and is judged."""
    ours, theirs, openings = stories.parts(0)
    assert not {r["prompt"] for r in ours} & {r["prompt"] for r in theirs}
    assert len(openings) >= ClaimConfig().eval_prompts
    monkeypatch.setattr(stories, "parts", lambda seed: (ours[:48], theirs[:48], openings[:48]))
    world = stories.StoryWorld(tmp_path / "world", task, 0, 1, 16)
    found = run_cell(Cell(task, 0), lambda *_: world, tmp_path, "")
    assert found["judgement"]["win_rate"] == 0.5
    assert 0 < found["judgement"]["length"] <= stories.MAX_RESPONSE
    assert -1 <= found["quality"]["rm"] <= 1
    assert ("judge_accuracy" in found["quality"]) == (task == "stories-taste")
    assert found["quality"]["rm_rm2"] < 0.999, "two reward models"
    rto = run_cell(Cell(task, 0, "RTO", 1e-4), lambda *_: world, tmp_path, "")
    assert rto["judgement"]["kl"] != 0
    assert rto["curve"]["samples"] == [64]
    asked = set(openings[:16])
    assert asked == set(world.eval_prompts), "the prompts that models are judged on"
    for name in ("corpus", "pairs", "prompts", *(["held_out"] if task == "stories-taste" else [])):
        assert not asked & {r["prompt"] for r in read_rows(world.root / f"{name}.jsonl")}, name
