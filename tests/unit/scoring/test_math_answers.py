"""Rewards that compare a response's answer with the data's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from loop_helpers import write_rows
from reward_helpers import columns_of

from rto_fast import cli, commands
from rto_fast.contract import ResponseTexts
from rto_fast.errors import ConfigError, RewardError
from rto_fast.scoring.math_answers import correct, last_number, wanted_answer
from rto_fast.scoring.reward_function import FunctionReward
from rto_fast.trainer import train


@pytest.mark.parametrize(
    ("response", "answer", "score", "answered"),
    [
        ("34 + 8 = 42", "a long way\n#### 42", 1, 1),
        ("It is 1,042.", "#### 1042", 1, 1),
        ("so 42.0", "#### 42", 1, 1),
        ("42, no, 43", "#### 42", 0, 1),
        ("10-5=-5", "#### -5", 1, 1),
        ("10-5", "#### 5", 1, 1),
        ("none", "#### 42", 0, 0),
        ("", "#### 42", 0, 0),
        ("42", 42, 1, 1),
        (".5", "#### 0.5", 1, 1),
    ],
)
def test_last_number(response, answer, score, answered):
    assert last_number([response], [answer]) == [(score, {"answered": answered, "unreadable": 0})]


@pytest.mark.parametrize("answer", [None, "", "#### none"])
def test_an_answer_of_the_data_that_has_no_number(answer):
    assert last_number(["42", "none"], [answer] * 2) == [
        (0, {"answered": 1, "unreadable": 1}), (0, {"answered": 0, "unreadable": 1})]  # fmt: skip


def test_the_answer_stands_behind_the_last_mark():
    assert wanted_answer("#### 3 then\n#### 1,042 \n") == "1,042"
    assert wanted_answer("x = 3") == "x = 3"


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        (r"Thus \boxed{42}.", "a way\n#### 42", 1),
        (r"Half: $\frac{1}{2}$", "0.5", 1),
        (r"The answer is \boxed{x^2 + 2x + 1}", "(x+1)^2", 1),
        ("34 + 8 = 43", "#### 42", 0),
        ("no idea", "#### 42", 0),
        ("It costs 1,042 dollars", "#### 1,042", 1),
    ],
)
def test_math_verify(response, answer, score):
    pytest.importorskip("math_verify")
    ((found, metrics),) = correct([response], [answer])
    assert found == score
    assert metrics == {"answered": float(response != "no idea"), "unreadable": 0.0}


def test_without_math_verify_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    texts = ResponseTexts(["p"], ["42"], [[]], columns={"answer": ["#### 42"]})
    with pytest.raises(RewardError) as error:
        FunctionReward("f", correct, ("responses", "answer")).judge(texts)
    assert str(error.value).startswith("math-verify is not installed; pip install 'rto-fast[math]', or ")


def test_the_reward_wants_the_column_answer():
    with pytest.raises(ConfigError, match=r"wants 'answer', and there are .* columns question, solution, each"):
        FunctionReward.load("rto_fast.scoring.math_answers:correct", columns_of({"question": "a", "solution": "b"}))


@pytest.mark.parametrize(
    "flags",
    [
        ["--advantage", "grpo"],
        ["--advantage", "gae", "--responses-per-prompt", "1", "--rollout-batch", "8"],
        ["--dpo-model", "{dpo}"],
    ],
    ids=["GRPO", "PPO", "RTO"],
)
def test_the_recipe_runs_each_method_by_its_flags(one_rank, tiny, tmp_path, flags):
    """On words for numbers: what is asked is that the answer's column arrives and which parts of the loop work."""
    texts = [json.loads(line)["prompt"] for line in Path(tiny.prompts).read_text().splitlines()]
    data = write_rows(tmp_path / "rows.jsonl", [{"question": t, "answer": f"#### {i}"} for i, t in enumerate(texts)])
    args = [
        "--policy", tiny.policy, "--data", data, "--output-dir", str(tmp_path / "run"), "--dtype", "fp32",
        "--rollout-batch", "4", "--responses-per-prompt", "2", "--train-batch", "4", "--iterations", "1",
        "--max-prompt-length", "16", "--max-response-length", "12", "--data-cache", "False", "--data-workers", "1",
        "--reward-fn", "rto_fast.scoring.math_answers:last_number", "--report", "False",
    ]  # fmt: skip
    config = cli.parse(commands.RLVR, [*args, *(f.format(dpo=tiny.dpo) for f in flags)])
    run = train(config)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    name = "reward/rto_fast.scoring.math_answers:last_number"
    assert row[f"{name}/unreadable"] == 0
    assert row[f"{name}/answered"] == 0  # there is no number among the words
    assert (row["reward/dense"] != 0) == ("--dpo-model" in flags)
    assert (run.critic is not None) == ("gae" in flags)
