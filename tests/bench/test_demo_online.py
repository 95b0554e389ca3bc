"""The table of online token rewards: its arithmetic with known numbers, its cells, and a toy run that is killed."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
import time
from pathlib import Path

import pytest
from launches import Launch
from loop_helpers import ROOT
from recipe_helpers import flags_of

from bench import demo_online
from bench.claim.cells import METHODS, ONLINE, DemoWorld, rl_settings
from bench.claim.grid import ClaimConfig, make_world
from bench.demo_online import MODELS, OnlineConfig, Table, spread
from rto_fast import trainer
from rto_fast.demo.config import DemoConfig
from rto_fast.demo.pipeline import rl_config
from rto_fast.errors import ConfigError

# Tables


def result(reward: float, kl: float = 1.0, accuracy: list[float | None] | None = None) -> dict:
    judged = {"true_reward": reward, "kl": kl, "win_rate": 0.75, "length": 20.04}
    return {"judgement": judged, "curve": {"accuracy": accuracy} if accuracy else {}}


@pytest.fixture
def table() -> Table:
    """Seed 1's PRIME diverged, seed 2 has only the frozen reward."""
    found = {(0, m): result(i, kl=-1e-6 if m == "SFT" else i) for i, m in enumerate(MODELS)}
    found |= {(1, m): result(2 * i) for i, m in enumerate(MODELS)} | {(2, "RTO"): result(9.0)}
    found[0, "online RTO"] = result(4.0, 4.0, [0.25, 0.75, None, 1.0])
    found[1, "online RTO"] = result(8.0, 1.0, [1.0, 1.0, 0.5, 0.5])
    found[0, "PRIME"] = result(2.5, 5.0, [None, None, 1.0, 1.0])
    found[1, "PRIME"] = {"failed": "diverged"}
    return Table((0, 1, 2), found)


def test_a_row_a_model(table):
    lines = table.by_model().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "SFT", "DPO", "PPO", "RTO, frozen", "online RTO", "PRIME",
    ]  # fmt: skip
    assert lines[2] == "| SFT | 0.00 ± 0.00 |  | 0.50 ± 0.71 | 75 % | 20.0 |  | 2 |", "no KL of -0.00"
    assert lines[5] == "| RTO, frozen | 6.00 ± 3.00 |  | 1.67 ± 1.15 | 75 % | 20.0 |  | 3 |"
    assert lines[6] == "| online RTO | 6.00 ± 2.83 | +1.50 ± 0.71 | 2.50 ± 2.12 | 75 % | 20.0 | 0.75, 0.75 | 2 |"
    assert lines[7] == "| PRIME | 2.50 | -0.50 | 5.00 | 75 % | 20.0 |  | 1 |", "a half without pairs has no accuracy"


def test_a_row_a_seed(table):
    lines = table.by_seed().splitlines()
    assert lines[2] == "| 0 | 0.00 | 1.00 | 2.00 | 3.00 | 4.00 | 2.50 | 3.0, 4.0, 5.0 | 0.50, 1.00 |"
    assert lines[3] == "| 1 | 0.00 | 2.00 | 4.00 | 6.00 | 8.00 |  | 1.0, 1.0,  | 1.00, 0.50 |"
    assert lines[4] == "| 2 |  |  |  | 9.00 |  |  | 1.0, ,  |  |"


def test_mean_and_deviation():
    assert spread([]) == ""
    assert spread([1.0], "+") == "+1.00"
    assert spread([-1.0, -3.0]) == "-2.00 ± 1.41"


def test_the_section_stands_between_its_marks(table, tmp_path, monkeypatch):
    page = tmp_path / "docs" / "results" / "demo.md"
    page.parent.mkdir(parents=True)
    page.write_text("a\n<!-- online -->\nold\n<!-- /online -->\nb\n")
    monkeypatch.setattr(demo_online, "ROOT", tmp_path)
    for _ in range(2):
        made = demo_online.write(OnlineConfig(page=True), {"command": "c", "missing": [], "cells": []}, table)
        assert page.read_text() == f"a\n<!-- online -->\n{made}\n<!-- /online -->\nb\n"
    assert (ROOT / "docs" / "results" / "demo.md").read_text().count("<!-- online -->") == 1


# Settings


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seeds": ()}, "seeds: at least one"),
        ({"seeds": (1, 1)}, "seeds: one of .* twice"),
        ({"online_lr": 0.0}, "online_lr: must be positive"),
        ({"iterations": 0}, "iterations: must be positive"),
    ],
)
def test_settings_that_cannot_work(setting, message):
    with pytest.raises(ConfigError, match=message):
        OnlineConfig(**setting).validate()


def test_sizes_and_rates_are_the_demos():
    """But for what a cell never keeps, frozen RTO's settings are those of `make demo`."""
    config, demo = OnlineConfig(), DemoConfig()
    world = make_world(Path("runs"), config, "demo", 3)
    assert type(world) is DemoWorld
    assert dataclasses.replace(world.config, output_dir="", seed=0) == dataclasses.replace(demo, output_dir="")
    assert world.task.openings == "all"
    cells = config.cells()
    assert cells[3, "DPO"].lr == demo.dpo_lr
    ours, theirs = rl_settings(world, cells[3, "RTO"], Path("x")), rl_config(world.config, world.root, "RTO")
    differ = {f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)}
    assert differ == {"output_dir", "save_every", "report", "report_samples"}


@pytest.mark.parametrize("arm", ONLINE)
def test_arms_differ_from_the_frozen_reward_in_what_they_are(arm):
    config = OnlineConfig()
    world, cells = make_world(Path("runs"), config, "demo", 0), config.cells()
    frozen, ours = (rl_settings(world, cells[0, m], Path("x")) for m in ("RTO", arm))
    ours.validate()
    differ = {f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(frozen, f.name)}
    start = {"dpo_model"} if arm == "PRIME" else {"responses_per_prompt", "rollout_batch"}
    assert differ == {"online", "online_lr", "online_beta"} | start
    assert ours.responses == frozen.responses
    assert ours.online_beta == DemoConfig().dpo_beta
    assert ours.dpo_model == (str(world.root / ("sft" if arm == "PRIME" else "dpo") / "model"),)


def test_the_claims_grid_is_what_it_was():
    assert not {*ONLINE} & {*METHODS}
    assert not {*ONLINE} & {*ClaimConfig().methods}


# A toy run

TINY = {"seeds": 0, "iterations": 2, "corpus_rows": 320, "pairs": 96, "eval_prompts": 32, "workers": 1}


def command_of(folder: Path, **settings) -> list[str]:
    given = TINY | {"runs": folder, "out": folder / "online.json"} | settings
    return ["-m", "bench.demo_online", *flags_of(given)]


def cells_in(folder: Path) -> dict[str, int]:
    """{name: when it was written}."""
    return {p.stem: p.stat().st_mtime_ns for p in (folder / "demo" / "seed0").glob("*.json")}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(folder of a whole run, its cells when it was killed in the middle)."""
    folder = tmp_path_factory.mktemp("online")
    first = Launch(command_of(folder), ranks=1, log=folder / "log")
    deadline = time.monotonic() + 500
    while len(cells_in(folder)) < 3 and time.monotonic() < deadline:
        assert first.processes[0].is_alive(), first.output()
        time.sleep(0.05)
    first.kill()
    there = cells_in(folder)
    assert not (folder / "online.json").exists()
    again = Launch(command_of(folder), ranks=1, log=folder / "log").wait(500)
    assert again.returncode == 0, again.output
    return folder, there


@pytest.mark.slow
def test_a_killed_run_goes_on(killed):
    folder, there = killed
    assert 3 <= len(there) < len(MODELS)
    now = cells_in(folder)
    assert {name: now[name] for name in there} == there, "no cell is trained twice"
    record = json.loads((folder / "online.json").read_text())
    assert record["missing"] == []
    assert {c["method"] for c in record["cells"]} == {*MODELS}
    assert record["command"].startswith("python -m bench.demo_online --seeds 0 --iterations 2")


@pytest.mark.slow
def test_every_model_is_judged(killed):
    cells = {c["method"]: c for c in json.loads((killed[0] / "online.json").read_text())["cells"]}
    assert cells["SFT"]["judgement"]["win_rate"] == 0.5
    assert len({c["judgement"]["true_reward"] for c in cells.values()}) == len(MODELS)
    ppo, rto, prime = (cells[m]["curve"] for m in ("PPO", "RTO", "PRIME"))
    assert ppo["reward"][0] == rto["reward"][0] == prime["reward"][0], "the first rollouts are the same samples"
    assert all(c["curve"]["samples"] == [64, 128] for m, c in cells.items() if m not in ("SFT", "DPO"))
    assert all(len(cells[arm]["curve"]["accuracy"]) == 2 for arm in ONLINE)


@pytest.mark.slow
def test_cells_are_the_demos_own_models(killed, one_rank, tmp_path):
    """DPO's is the one that gives token rewards; RTO trained by the demo's settings is judged the same."""
    folder, _ = killed
    config = OnlineConfig(**{k: v for k, v in TINY.items() if k != "seeds"}, seeds=(0,), runs=str(folder))
    world, cells = make_world(folder, config, "demo", 0), config.cells()

    def found(model):
        return json.loads((folder / f"{cells[0, model].name}.json").read_text())["judgement"]

    assert dataclasses.asdict(world.judge(world.root / "dpo" / "model")) == found("DPO")
    trainer.train(dataclasses.replace(rl_config(world.config, world.root, "RTO"), output_dir=str(tmp_path)))
    assert dataclasses.asdict(world.judge(tmp_path / "policy")) == found("RTO")


def run_here(monkeypatch: pytest.MonkeyPatch, folder: Path, **settings) -> int:
    """The command in this process, where no cell is left to be trained; its exit code."""
    monkeypatch.setattr(sys, "argv", command_of(folder, **settings)[1:])
    try:
        runpy.run_path(str(ROOT / "bench" / "demo_online.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.slow
def test_report_of_what_is_there(killed, tmp_path, monkeypatch, capsys):
    """A seed more: nothing is trained, and what is missing is counted."""
    out = tmp_path / "online.json"
    assert run_here(monkeypatch, killed[0], seeds=(0, 1), out=out, report_only=()) == 0
    record = json.loads(out.read_text())
    assert len(record["missing"]) == len(MODELS)
    assert "demo/seed1/SFT" in record["missing"]
    assert f"{len(MODELS)} cells had not run" in capsys.readouterr().out
    assert "--report-only" not in record["command"]


@pytest.mark.slow
def test_cells_of_other_sizes_are_refused(killed, monkeypatch, capsys):
    assert run_here(monkeypatch, killed[0], iterations=3) == 2
    assert "holds cells of other sizes: iterations=2 (now 3)" in capsys.readouterr().err
