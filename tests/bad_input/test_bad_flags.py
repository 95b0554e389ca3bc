"""Flags and the settings they give."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import shlex
import sys
import textwrap

import pytest
from loop_helpers import ROOT
from recipe_helpers import RECIPES, run_recipe
from refusal_helpers import REFUSED

from rto_fast import distributed

pytestmark = pytest.mark.usefixtures("one_rank")

FLAGS = {
    "a misspelt flag": ("rto_llama3.py", ["--polcy", "x"], r"unknown flag --polcy; did you mean --policy\?"),
    "a flag of another stage": ("rm_llama3.py", ["--beta1=1"], r"unknown flag --beta1; .*--help"),
    "an underscored misspelling": ("dpo_llama3.py", ["--adam_beta", "1"], r"--adam_beta; did you mean --adam-betas\?"),
    "a misspelt objective": (
        "dpo_llama3.py", ["--objective", "tdpo12"], r"--objective: 'tdpo12' is no choice; did you mean tdpo[12]\?",
    ),
    "a misspelt choice of another stage": (
        "rto_llama3.py", ["--policy_update=reble"], r"--policy_update: 'reble' is no choice; did you mean rebel\?",
    ),
    "a ZeRO stage that is not there": ("rm_llama3.py", ["--zero-stage", "4"], r"'4' is no choice; there are 0, 1, 2"),
    "a word that is no flag": ("sft_llama3.py", ["extra"], r"unknown flag extra; --help"),
    "stage 0 in bf16": ("rto_llama3.py", ["--zero-stage", "0", "--dtype", "bf16"], r"zero_stage: .*bf16.*--dtype fp32"),
    "stage 0 in bf16, supervised": ("dpo_llama3.py", ["--zero-stage", "0", "--dtype", "bf16"], r"zero_stage: "),
    "offload without ZeRO": ("rm_llama3.py", ["--zero-stage", "0", "--offload", "True"], r"offload: needs ZeRO"),
    "batches that do not divide": ("rto_llama3.py", ["--train-batch", "3"], r"train_batch: 3 does not divide the 8"),
    "a train batch over the rollout": ("ppo_llama3.py", ["--train-batch", "16"], r"train_batch: 16 does not divide"),
    "an empty batch": ("sft_llama3.py", ["--batch", "0"], r"batch: must be at least 1, got 0"),
    "no learning rate": ("rm_llama3.py", ["--lr", "0"], r"lr: must be positive, got 0"),
    "a negative learning rate": ("rto_llama3.py", ["--policy-lr", "-1"], r"policy_lr: must be positive, got -1"),
    "no learning rate of the critic": ("ppo_llama3.py", ["--critic-lr", "0"], r"critic_lr: must be positive, got 0"),
    "an infinite learning rate": ("sft_llama3.py", ["--lr", "inf"], r"lr: must be finite, got inf"),
    "a weight that is no number": ("rto_llama3.py", ["--reward-weight", "nan"], r"reward_weight: must be finite"),
    "a beta of 1": ("dpo_llama3.py", ["--adam-betas", "0.9", "1"], r"adam_betas: must lie in \[0, 1\), got \(0.9, 1"),
    "a negative warm-up": ("rto_llama3.py", ["--critic-warmup", "-1"], r"critic_warmup: must not be negative"),
    "negative retries": ("rto_llama3.py", ["--reward-retries", "-1"], r"reward_retries: must not be negative"),
    "no time": ("rto_llama3.py", ["--reward-timeout-s", "0"], r"reward_timeout_s: must be positive, got 0"),
    "negative samples": ("rto_llama3.py", ["--report-samples", "-1"], r"report_samples: must not be negative"),
    "negative exports": ("rto_llama3.py", ["--export-every", "-1"], r"export_every: must not be negative"),
    "a folder for a template": ("rm_llama3.py", ["--chat-template", "."], r"chat_template: no file '\.'; give auto"),
    "a PTX loss without rows": ("rto_llama3.py", ["--ptx-coef", "0.5"], r"ptx_data: ptx_coef 0.5 needs supervised"),
    "rows without a PTX loss": ("ppo_llama3.py", ["--ptx-data", "x.jsonl"], r"ptx_data: 'x.jsonl' is not read with"),
    "a negative PTX loss": ("rto_llama3.py", ["--ptx-coef", "-1"], r"ptx_coef: must not be negative, got -1"),
    "an online token reward of PPO": ("ppo_llama3.py", ["--online", "prime"], r"online: prime trains the DPO model"),
    "online pairs of one response": (
        "rto_llama3.py", ["--online", "dpo"], r"responses_per_prompt: online dpo needs at least 2",
    ),
    "a rate of nothing online": ("rto_llama3.py", ["--online-lr", "1e-3"], r"online_lr: 0.001 is not read with --onl"),
    "a negative coefficient": ("rto_llama3.py", ["--beta2", "-1"], r"beta2: must not be negative, got -1"),
    "an evaluation on what is trained on": (
        "rm_llama3.py", ["--eval-split", "train"], r"eval_split: 'train' is data_split too",
    ),
    "no data": ("rto_llama3.py", ["--data", ""], r"data: no data set given; pass --data"),
    "no policy": ("ppo_llama3.py", ["--policy", ""], r"policy: no model given; pass --policy"),
    "no DPO model": ("rto_llama3.py", ["--dpo-model", ""], r"dpo_model: beta1 > 0 needs .*--dpo-model, .*or --beta1 0"),
    "no reward": ("rto_llama3.py", ["--reward-model"], r"reward_model: no reward source; pass --reward-mod"),
    "too many weights": ("rto_llama3.py", ["--reward-weight", "1", "2"], r"reward_weight: 2 weights for 1 reward"),
    "a KL target with no coefficient to move": (
        "rto_llama3.py", ["--kl-target", "0.1", "--beta2", "0"], r"kl_target: beta2 is multiplied .* 0 stays 0",
    ),
    "a critic from no reward model": (
        "rto_llama3.py", ["--reward-model", "--reward-fn", "json:dumps", "--critic", "reward"],
        r"critic: 'reward' needs a reward model",
    ),
    "a length over the positions": ("rm_llama3.py", ["--max-length", "129"], r"max_length: 129 .* 128 positions"),
    "an RTO length over the positions": (
        "rto_llama3.py", ["--max-prompt-length", "120"],
        r"max_prompt_length \+ max_response_length: 132 tokens exceed the model's 128 positions",
    ),
    "no such model": ("dpo_llama3.py", ["--model", "/no/such/model"], r"model: no model at '/no/such/model'"),
    "no such reward model": ("rto_llama3.py", ["--reward-model", "/no/such"], r"reward_model: no model at '/no/such'"),
    "no such reference": ("dpo_llama3.py", ["--reference", "/no/such"], r"reference: no model at '/no/such'"),
    "no such template": ("rm_llama3.py", ["--chat-template", "x.jinja"], r"chat_template: no file 'x.jinja'"),
    "a reward function without a colon": ("ppo_llama3.py", ["--reward-fn", "json"], r"reward_fn: 'json' is not modul"),
    "an unknown module": ("rto_llama3.py", ["--reward-fn", "jsom:dumps"], r"reward_fn: .*jsom.*did you mean .*json"),
    "an unknown function": ("rto_llama3.py", ["--reward-fn", "json:dump5"], r"reward_fn: json has no 'dump5'; did yo"),
    "a function of other arguments": ("rto_llama3.py", ["--reward-fn", "json:loads"], r"json:loads wants 's'"),
    "a missing function file": ("rto_llama3.py", ["--reward-fn", "no/f.py:g"], r"reward_fn: file no/f.py .*not exist"),
    "a shared engine that is not vLLM's": (
        "rto_llama3.py", ["--vllm-tensor-parallel", "2"],
        r"vllm_tensor_parallel: is for --rollout-engine vllm, not 'auto'",
    ),
    "an engine for more ranks than there are": (
        "rto_llama3.py", ["--rollout-engine", "vllm", "--vllm-tensor-parallel", "2"],
        r"vllm_tensor_parallel: 2 does not divide the 1 ranks of this launch",
    ),
    "over-sampling from servers": (
        "ppo_llama3.py", ["--rollout-engine", "vllm-serve", "--rollout-oversample", "0.5"],
        r"rollout_oversample: servers answer in no fixed order",
    ),
    "less than no over-sampling": (
        "rto_llama3.py", ["--rollout-oversample", "-0.5"], r"rollout_oversample: must not be negative, got -0.5",
    ),
    "a URL that is none": ("rto_llama3.py", ["--reward-url", "ftp://x"], r"reward_url: 'ftp://x' must start with http"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name, refused):
    recipe, flags, message = FLAGS[name]
    refused(recipe, message, *flags)


@pytest.mark.parametrize(("flag", "value"), [("--seed", "x"), ("--dtype", "fp8"), ("--zero-stage", "4")])
def test_value_of_another_type(run, settings, flag, value):
    """tyro's own message, in a box."""
    code, _, stderr = run("rm_llama3.py", flag, value)
    assert code == REFUSED
    assert flag in stderr
    assert value in stderr
    assert "Traceback" not in stderr
    assert not settings["rm_llama3.py"]["output_dir"].exists()


def test_function_file_that_fails(refused, tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module_at_all\n")
    refused("rto_llama3.py", r"reward_fn: importing .*broken.py raised ModuleNotFoundError",
            reward_fn=f"{tmp_path}/broken.py:f")  # fmt: skip


def test_wandb_that_is_not_installed(refused, monkeypatch):
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "wandb" else find_spec(name, *a))
    refused("rto_llama3.py", "wandb_project: wandb is not installed", wandb_project="p")
    refused("rm_llama3.py", "wandb_project: wandb is not installed", wandb_project="p")


@pytest.mark.parametrize("recipe", RECIPES)
def test_help(recipe, monkeypatch, capsys):
    """Every field with its default and what it means, under `deepspeed` too, which adds a flag of its own."""
    monkeypatch.setenv("COLUMNS", "400")
    assert run_recipe(recipe, ["--local_rank=0", "--help"], monkeypatch) == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for name, default, meaning in fields_of(recipe, monkeypatch):
        flag = "--" + name.replace("_", "-")
        shown = shlex.join(map(str, default if isinstance(default, tuple) else (default,)))
        entry = re.search(rf"{flag} (?:\[?[A-Z{{]).*?\(default:(.*?)\)", text)
        assert entry, f"{flag} is not in the help"
        assert entry[1].strip() == shown, f"{flag}: default"
        assert meaning, f"{flag}: no docstring"
        assert " ".join(meaning.split()).replace("`", "") in entry[0].replace("`", ""), f"{flag}: its meaning"


def fields_of(recipe: str, monkeypatch) -> list[tuple[str, object, str]]:
    """(name, the recipe's default, docstring) of every setting, read from the sources."""
    import dataclasses
    import runpy

    path = ROOT / "recipes" / recipe
    monkeypatch.setattr(sys, "argv", [str(path)])
    space = runpy.run_path(str(path), run_name="recipe")
    defaults = space["DEFAULTS"]
    meanings = {}
    for cls in reversed(type(defaults).__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for field, after in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                meanings[field.target.id] = after.value.value
    return [
        (f.name, getattr(defaults, f.name), meanings.get(f.name, "")) for f in dataclasses.fields(defaults) if f.init
    ]


def test_servers_that_ranks_elsewhere_could_not_reach(refused, monkeypatch):
    """Rank 0 is on one machine, two others on another; nothing is loaded on any."""
    monkeypatch.setattr(distributed, "hosts", lambda: ["node-a", "node-a", "node-b", "node-b"])
    from_afar = r"reached from node-a alone, and ranks run on node-b too"
    refused("rto_llama3.py", f"vllm_url: the recipe's own servers are {from_afar}", rollout_engine="vllm-serve")
    for url in ("unix:/run/vllm/socket", "http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000"):
        message = rf"vllm_url: {re.escape(url)} is {from_afar}"
        refused("rto_llama3.py", message, rollout_engine="vllm-serve", vllm_url=f"http://x {url}".split())
    refused("rto_llama3.py", "no/such/model", rollout_engine="vllm-serve", vllm_url="http://x", policy="no/such/model")
