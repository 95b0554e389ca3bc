"""The `rto-fast` command: what it offers, and what it says of what it does not know."""

from __future__ import annotations

import dataclasses
import pkgutil
import runpy
import sys
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from loop_helpers import ROOT

from rto_fast import __main__, cli, commands
from rto_fast.errors import REFUSED, ConfigError


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


def test_the_recipe_of_adapters_is_rto_with_other_defaults(monkeypatch):
    """On one base: what trains the adapters that it names starts from the policy."""
    called = []
    monkeypatch.setattr(commands.cli, "main", lambda *args, prog: called.append((args, prog)))
    monkeypatch.setattr(sys, "argv", ["recipes/rto_lora.py", "--seed", "3"])
    space = runpy.run_path(str(ROOT / "recipes" / "rto_lora.py"), run_name="__main__")
    (((defaults, run, args), prog),) = called
    assert (defaults, run, args, prog) == (space["DEFAULTS"], commands.COMMANDS["rto"].run, ["--seed", "3"], None)
    assert commands.COMMANDS["rto"].defaults is commands.RTO  # the command keeps its own
    differ = {
        f.name for f in dataclasses.fields(defaults) if getattr(defaults, f.name) != getattr(commands.RTO, f.name)
    }
    assert differ == {"lora_rank", "dpo_model", "reward_model", "output_dir"}
    defaults.validate()
    assert defaults.policy == commands.DPO.model
    assert f"--model {defaults.policy} " in space["__doc__"]
    for folder in (*defaults.dpo_model, *defaults.reward_model):
        assert f"--output-dir {folder.removesuffix('/model')}\n" in space["__doc__"]


def changed(value, kind):
    """Another value of a field's type, and the words that give it on the command line."""
    if get_origin(kind) is Literal:
        value = next(choice for choice in get_args(kind) if choice != value)
    elif get_origin(kind) is tuple:
        value = tuple(0.25 if get_args(kind)[0] is float else f"other{i}" for i in range(2))
    elif kind is bool or bool in get_args(kind):
        value = value is not True
    elif kind is str:
        value = "other"
    else:
        value = (value or 0) + 1
    return value, [str(v) for v in (value if isinstance(value, tuple) else (value,))]


STAGES = [name for name, command in commands.COMMANDS.items() if isinstance(command, commands.Stage)]


@pytest.mark.parametrize("name", STAGES)
def test_no_command_overrides_what_a_flag_says(name):
    """Every field: its flag's value stands in the config, or it has no flag and the message says what to pass."""
    defaults = commands.COMMANDS[name].defaults
    defaults = pkgutil.resolve_name(defaults)() if isinstance(defaults, str) else defaults
    kinds = get_type_hints(type(defaults))
    values, flags = {}, []
    for field in dataclasses.fields(defaults):
        value, words = changed(getattr(defaults, field.name), kinds[field.name])
        flag = "--" + field.name.replace("_", "-")
        if field.init:
            values[field.name] = value
            flags += [flag, *words]
        else:
            with pytest.raises(ConfigError, match=f"^{flag}: this command does not read it; .* pass --"):
                cli.parse(defaults, [flag, *words])
    config = cli.parse(defaults, flags)
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("distill", "--dpo-model x", "dpo_model: distillation does not read it; the teacher is --teacher"),
        ("distill", "--dpo-ref x", "dpo_ref: .* taken against --base"),
        ("distill", "--token-reward-weight 2", "token_reward_weight: .* is --scale"),
        ("distill", "--token-reward-alpha 2", "token_reward_alpha: "),
        ("distill", "--online prime", "online: distillation does not read it; the teacher stays as it is"),
        ("rto", "--token-reward-alpha 2", "token_reward_alpha: 2.0 is not read without --token-reward endogenous"),
        ("rto", "--token-reward endogenous --dpo-ref x", "dpo_ref: 'x' is not read without --token-reward dpo"),
        ("rto", "--token-reward endogenous --dpo-weight 2", r"dpo_weight: \(2.0,\) is not read without --token-rewar"),
        ("rto", "--segment-entropy 1", "segment_entropy: 1.0 is not read without --credit segment"),
        ("rto", "--delimiters x", r"delimiters: \('x',\) is not read without --credit sentence"),
        ("rto", "--rebel-eta 2", "rebel_eta: 2.0 is not read without --policy-update rebel"),
        ("dpo", "--r-dpo-alpha 1", "r_dpo_alpha: 1.0 is not read with --objective dpo"),
        ("dpo", "--objective simpo --beta 2", "beta: 2.0 is not read with --objective simpo; its scale is --simpo-"),
        ("dpo", "--objective tdpo1 --tdpo-alpha 1", "tdpo_alpha: 1.0 is not read with --objective tdpo1"),
        ("dpo", "--tis-high 2", "tis_high: 2.0 is not read"),
        ("dpo", "--tgdpo-alpha 2", "tgdpo_alpha: 2.0 is not read"),
        ("dpo", "--label-key good", "label_key: 'good' is not read"),
        ("audit", "--run r --beta1 0.2", "beta1: 0.2 is not read of --run, for it has its own"),
        ("audit", "--run r --max-rows 9", "max_rows: 9 is not read of --run"),
        ("audit", "--run r --score-key s", "score_key: 's' is not read of --run"),
        ("audit", "--run r --dtype fp32", "dtype: 'fp32' is not read of --run, for no --reward-model reads its respon"),
        ("generate", "--model m --data d --output o --greedy True --temperature 0.5", "temperature: 0.5 is not read"),
        ("generate", "--model m --data d --output o --packing off", "packing: is for forwards for log-probs"),
    ],
)  # fmt: skip
def test_a_setting_that_nothing_reads_is_refused(name, flags, message):
    defaults = commands.COMMANDS[name].defaults
    defaults = pkgutil.resolve_name(defaults)() if isinstance(defaults, str) else defaults
    with pytest.raises(ConfigError, match=f"^{message}"):
        cli.parse(defaults, flags.split()).validate()


def test_what_follows_from_other_flags_follows_from_those_given():
    config = cli.parse(commands.DISTILL, ["--teacher", "t", "--scale", "1.5", "--beta2", "2", "--base", "b"])
    assert (config.beta1, config.token_reward, config.reference) == (3.0, ("logratio:t",), "b")


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
    ("flags", "scale"),
    [
        ([], 0.0),
        (["--dpo-model", "dpo"], 0.05),
        (["--dpo-model", "dpo", "--beta1", "0.1"], 0.1),
        (["--token-reward", "endogenous"], 0.05),
        (["--dpo-model", "dpo", "--beta1", "0"], 0.0),
        (["--beta1", "0"], 0.0),
    ],
)
def test_rlvr_pays_token_rewards_where_a_model_for_them_is_named(flags, scale):
    """And where beta1 is not 0."""
    parsed = cli.parse(commands.RLVR, ["--data", "rows.jsonl", *flags])
    parsed.validate()
    assert sum(parsed.beta1 * weight for _, weight in parsed.token_sources) == scale
    assert parsed.pays_tokens == (scale > 0)
    assert not parsed.uses_critic
    assert dataclasses.replace(parsed, seed=1).token_sources == parsed.token_sources


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--beta1 0.1", "beta1: 0.1 scales token rewards, and none is named; pass --dpo-model or --token-reward"),
        ("--credit sentence", "credit: 'sentence' is not read where no token reward is named"),
        ("--dpo-clip 0.2", "dpo_clip: 0.2 is not read where no token reward is named; pass --dpo-model or --token-r"),
        ("--dpo-ref r", "dpo_ref: 'r' is not read where no token reward is named"),
        ("--dpo-weight 1", "dpo_weight: "),
        ("--dpo-model d --beta1 0 --token-reward endogenous", "token_reward: beta1 = 0 pays no token rewards"),
    ],
)
def test_rlvr_refuses_what_no_token_reward_reads(flags, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        cli.parse(commands.RLVR, ["--data", "rows.jsonl", *flags.split()]).validate()


@pytest.mark.parametrize(
    "flag", ["--dpo-model d", "--dpo-weight 2", "--dpo-pessimism 1", "--dpo-ref r", "--dpo-clip 0.2",
             "--token-reward-weight 2", "--credit sentence"],
)  # fmt: skip
def test_ppo_refuses_what_no_token_reward_reads(flag):
    """With a beta1 it is RTO."""
    name, value = flag.split()
    message = f"^{name[2:].replace('-', '_')}: .* is not read by ppo; pass --beta1 above 0, or leave it out$"
    with pytest.raises(ConfigError, match=message):
        cli.parse(commands.PPO, [name, value]).validate()
    cli.parse(commands.PPO, ["--dpo-model", "d", "--beta1", "0.1"]).validate()


def test_rto_without_token_rewards_leaves_its_dpo_model_unread():
    config = cli.parse(commands.RTO, ["--dpo-model", "d", "--dpo-clip", "0.2", "--beta1", "0"])
    config.validate()
    assert not config.token_sources


def test_ppos_settings_are_rtos_without_the_token_reward():
    ours, theirs = dataclasses.asdict(commands.PPO), dataclasses.asdict(commands.RTO)
    assert {name for name in theirs if ours[name] != theirs[name]} == {"beta1", "dpo_model", "output_dir"}
    assert ours.keys() == theirs.keys()
    assert not commands.PPO.pays_tokens


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("rto", "--lora-policy-lr 1e-4", "lora_policy_lr: is for adapters; pass --lora-rank too"),
        ("rto", "--lora-critic-lr 1e-4", "lora_critic_lr: is for adapters; pass --lora-rank too"),
        ("rto", "--lora-critic own", "lora_critic: is for adapters; pass --lora-rank too"),
        ("rto", "--lora-push merged", "lora_push: is for adapters; pass --lora-rank too"),
        ("dpo", "--lora-lr 1e-4", "lora_lr: is for adapters; pass --lora-rank too"),
        ("rto", "--policy-lr 1e-6 --lora-rank 8", "policy_lr: 1e-06 is of whole weights; pass --lora-policy-lr"),
        ("rlvr", "--policy-lr 1e-5 --lora-rank 8", "policy_lr: 1e-05 is of whole weights; pass --lora-policy-lr"),
        ("ppo", "--critic-lr 1e-6 --lora-rank 8", "critic_lr: 1e-06 is of whole weights; pass --lora-critic-lr"),
        ("rto", "--online dpo --online-lr 1e-5 --responses-per-prompt 2 --lora-rank 8", "online_lr: 1e-05 is of whole"),
        ("sft", "--lr 1e-6 --lora-rank 8", "lr: 1e-06 is of whole weights; pass --lora-lr, the adapter's, or leave it"),
    ],
)
def test_a_rate_that_nothing_would_read_is_refused(name, flags, message):
    """Whole weights have their rates, adapters theirs; neither is taken for the other in silence."""
    stage = commands.COMMANDS[name]
    with pytest.raises(ConfigError, match=f"^{message}"):
        cli.parse(stage.defaults, ["--data", "rows.jsonl", *flags.split()]).validate()


@pytest.mark.parametrize("name", ["sft", "rm", "dpo", "rto", "ppo", "rlvr", "distill"])
def test_a_rank_alone_is_enough(name):
    teacher = ["--teacher", "t"] if name == "distill" else []
    cli.parse(commands.COMMANDS[name].defaults, ["--data", "rows.jsonl", "--lora-rank", "8", *teacher]).validate()
