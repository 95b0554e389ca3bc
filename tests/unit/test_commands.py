"""The `rto-fast` command: what it offers, and what it says of what it does not know."""

from __future__ import annotations

import dataclasses
import runpy
import sys

import pytest
from loop_helpers import ROOT

from rto_fast import __main__, cli, commands
from rto_fast.errors import REFUSED


def test_it_lists_its_commands(capsys):
    commands.main([])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == list(commands.COMMANDS)
    assert set(listed) == {
        "sft",
        "rm",
        "dpo",
        "rto",
        "ppo",
        "generate",
        "export",
        "extrapolate",
        "report",
        "audit",
        "memory",
        "demo",
        "distill",
        "rlvr",
        "arithmetic",
    }


@pytest.mark.parametrize(("wrong", "near"), [("rtoo", "rto"), ("exprot", "export"), ("Demo", "demo"), ("x", None)])
def test_an_unknown_command_is_refused_and_the_nearest_named(wrong, near, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main([wrong])
    assert stopped.value.code == REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    assert f"unknown command '{wrong}'" in line
    assert f"did you mean {near}?" in line if near else "did you mean" not in line


@pytest.mark.parametrize("name", ["rto", "generate"])
def test_a_wrong_flag_of_a_command_is_refused(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main(["--local_rank=0", name, "--sead", "3"])  # as deepspeed's launcher calls it
    assert stopped.value.code == REFUSED
    assert "unknown flag --sead; did you mean --seed?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("rto_llama3", "rto"), ("ppo_llama3", "ppo"), ("dpo_llama3", "dpo"), ("rm_llama3", "rm"), ("sft_llama3", "sft"),
     ("distill", "distill"), ("rlvr_math", "rlvr"), ("rto_tiny", "demo")],
)  # fmt: skip
def test_a_recipe_is_its_command(recipe, name, monkeypatch):
    called = []
    monkeypatch.setattr(commands.cli, "main", lambda *args, prog: called.append((args, prog)))
    monkeypatch.setattr(sys, "argv", [f"recipes/{recipe}.py", "--seed", "3"])
    space = runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
    commands.main([name, "--seed", "3"])
    (by_recipe, own_name), (by_command, prog) = called
    assert by_recipe == by_command
    assert by_recipe[0] is space["DEFAULTS"]
    assert (own_name, prog) == (None, f"rto-fast {name}")


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setattr(__main__, "NEEDED", ("torch", "no_such_package"))
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == REFUSED
    assert capsys.readouterr().err == "error: not installed: no_such_package; pip install 'rto-fast[train]'\n"


@pytest.mark.parametrize(
    "defaults", [commands.RTO, commands.DPO, commands.RM, commands.SFT, commands.DEMO, commands.RLVR]
)
@pytest.mark.parametrize("args", [[], ["--local_rank=0"], ["--seed", "3"]], ids=["none", "launcher", "one"])
def test_a_command_without_flags_has_the_defaults(defaults, args):
    """As `make demo` starts it, the launcher's own flag in front."""
    parsed = cli.parse(defaults, args)
    assert parsed == (dataclasses.replace(defaults, seed=3) if "3" in args else defaults)


def test_rlvr_without_data_is_refused_in_one_line(capsys):
    """Before anything is downloaded."""
    with pytest.raises(SystemExit) as stopped:
        commands.main(["rlvr"])
    assert stopped.value.code == REFUSED
    assert "error: data: no problems given; pass --data (rows with the columns 'question' and 'answer'), or try" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("flags", "beta1"),
    [
        ([], 0.0),
        (["--dpo-model", "dpo"], 0.05),
        (["--dpo-model", "dpo", "--beta1", "0.1"], 0.1),
        (["--token-reward", "endogenous"], 0.05),
    ],
)
def test_rlvr_pays_token_rewards_where_a_model_for_them_is_named(flags, beta1):
    parsed = cli.parse(commands.RLVR, ["--data", "rows.jsonl", *flags])
    parsed.validate()
    assert parsed.beta1 == beta1
    assert not parsed.uses_critic
