"""Reward sources: functions with every kind of fault, the data's columns, and what is tried before a run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from reward_helpers import WORDS, case, columns_of

from rto_fast.build import load_reward_sources
from rto_fast.config import RTOConfig
from rto_fast.contract import ResponseTexts
from rto_fast.data.columns import DataColumns
from rto_fast.errors import ConfigError, RewardError
from rto_fast.scoring.reward_function import OFFERED, FunctionReward, wanted_by
from rto_fast.scoring.reward_server import RemoteReward
from rto_fast.scoring.reward_source import try_sources
from rto_fast.scoring.score import weighted_sum

# Sum


def test_weighted_sum():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0], dtype=torch.float64)
    total = weighted_sum({"a": a, "b": b}, (0.5, 2.0))
    assert total.dtype == torch.float32
    assert total.tolist() == [20.5, 41.0]
    assert a.tolist() == [1.0, 2.0]
    nan = torch.tensor([float("nan"), 1.0])
    assert weighted_sum({"a": a, "nan": nan}, (1.0, 0.0)).tolist() == [1.0, 2.0]
    assert torch.isnan(weighted_sum({"a": a, "nan": nan}, (1.0, 0.1))).tolist() == [True, False]


@pytest.mark.parametrize(("named", "weights"), [({}, ()), ({"a": torch.zeros(2)}, (1.0, 2.0))])
def test_weighted_sum_refuses_other_counts(named, weights):
    with pytest.raises(ValueError, match="reward sources"):
        weighted_sum(named, weights)


# Functions


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_function_scores_each_response(kind):
    source = FunctionReward("f", lambda prompts, responses: kind([len(r) for r in responses]))
    score = source.score(*case())
    assert score.dtype == torch.float32
    assert score.tolist() == [len(w) for w in WORDS]


def test_function_sees_prompts_and_cannot_change_the_texts():
    def greedy(prompts, responses):
        assert prompts[1] == "p1:"
        prompts.clear()
        return [0.0] * len(responses)

    rollout, texts = case()
    FunctionReward("greedy", greedy).score(rollout, texts)
    assert len(texts.prompts) == len(WORDS)


def test_function_passes_non_finite_scores_on():
    values = [float("nan"), float("inf"), -math.inf, 1, 2, 3, 4]
    score = FunctionReward("f", lambda prompts, responses: values).score(*case())
    assert torch.isfinite(score).tolist() == [False] * 3 + [True] * 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "my:fn answered 1 scores for 7 responses"),
        (3.0, "my:fn answered a float, not 7 numbers"),
        (None, "my:fn answered a NoneType"),
        ("1234567", "my:fn answered a str"),
        ([0, 0, None, 0, 0, 0, 0], r"my:fn, sample 2: None is not a number \(response ''"),
        ([0, 0, 0, "1.0", 0, 0, 0], r"my:fn, sample 3: '1.0' is not a number \(response 'dddd'"),
        ([[1, 2]] * 7, r"my:fn, sample 0: \[1, 2\] is not a number"),
        (torch.zeros(7, 2), "my:fn, sample 0: tensor"),
    ],
)
def test_function_with_a_wrong_answer(answer, message):
    with pytest.raises(RewardError, match=message):
        FunctionReward("my:fn", lambda prompts, responses: answer).score(*case())


def test_function_that_raises_names_the_sample():
    def fn(prompts, responses):
        return [1 / len(r) for r in responses]

    with pytest.raises(RewardError, match="my:fn raised at sample 2: ZeroDivisionError: division by zero"):
        FunctionReward("my:fn", fn).score(*case())


def test_function_that_raises_on_the_batch_alone():
    def fn(prompts, responses):
        if len(responses) > 3:
            raise MemoryError("too many")
        return [0.0] * len(responses)

    with pytest.raises(RewardError, match="on the whole batch of 7, on no sample alone: MemoryError: too many"):
        FunctionReward("my:fn", fn).score(*case())


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(
        "LIMIT = 3\n"
        "def brevity(prompts, responses):\n    return [-len(r) for r in responses]\n"
        "def no_prompts(responses):\n    return responses\n"
        "def graded(responses, answer):\n    return [float(r == a) for r, a in zip(responses, answer)]\n"
        "def wrong(responses, answers):\n    return []\n"
        "def placed(responses, answer, /):\n    return []\n"
        "def blind(x=1):\n    return []\n"
        "def maybe(responses, answer=None, label=None):\n    return [2 * bool(answer) + bool(label)] * len(responses)\n"
        "def every(**given):\n    return [float(len(given))] * len(given['responses'])\n"
    )
    (tmp_path / "broken_scores.py").write_text("1 / 0\n")
    (tmp_path / "needy_scores.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("form", ["my_scores:brevity", "my_scores.py:brevity", "{}/my_scores.py:brevity"])
def test_function_is_loaded_from_a_module_or_a_file(user_folder, form):
    spec = form.format(user_folder)
    (source,) = load_reward_sources(RTOConfig(reward_fn=(spec,)), columns_of())
    assert source.name == spec
    assert source.score(*case()).tolist() == [-len(w) for w in WORDS]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_scores", "'my_scores' is not module:function"),
        (":brevity", "not module:function"),
        ("my_scores:", "not module:function"),
        ("my_scores:brevty", r"my_scores has no 'brevty'; did you mean brevity\?"),
        ("my_scores.py:brevty", r"has no 'brevty'; did you mean brevity\?"),
        ("my_scores:LIMIT", "my_scores has a non-callable 'LIMIT'"),
        ("my_score:brevity", r"module 'my_score' of 'my_score:brevity' not found; did you mean my_scores"),
        ("my_score.py:brevity", r"file my_score.py .* does not exist; did you mean my_scores.py"),
        ("nowhere/my_scores.py:brevity", "does not exist"),
        (
            "my_scores:graded",
            r"my_scores:graded wants 'answer', and there are prompts, responses, token_ids, messages, each",
        ),
        ("my_scores:blind", "my_scores:blind takes none of prompts, responses, token_ids, messages"),
        ("broken_scores:f", "importing broken_scores raised ZeroDivisionError"),
        ("broken_scores.py:f", "importing broken_scores.py raised ZeroDivisionError"),
        ("needy_scores:f", "importing needy_scores raised No module named 'not_installed_anywhere'"),
    ],
)
def test_function_spec_that_cannot_be_loaded(user_folder, spec, message):
    with pytest.raises(ConfigError, match=message):
        load_reward_sources(RTOConfig(reward_fn=(spec,)), columns_of())


def test_sources_are_tried_before_the_run(server):
    remote = RemoteReward(server.url, timeout_s=5.0, attempts=1)
    sources = [remote, FunctionReward("f", lambda prompts, responses: [0.0] * len(prompts))]
    try_sources(sources, ResponseTexts(["p", "q"], ["A response."] * 2, [[], []]))
    assert [body["prompts"] for body in server.bodies] == [["p", "q"]]
    server.always = 401
    with pytest.raises(ConfigError, match=r"reward_url: tried on the response 'A response\.': .* status 401"):
        try_sources(sources, ResponseTexts(["p"], ["A response."], [[]]))


# Columns and metrics


@pytest.fixture
def two_rows():
    """Columns and the texts of their two rows."""
    columns = columns_of(
        {"question": "a?", "answer": "a", "prompts": 1}, {"question": "b?", "answer": "bb", "prompts": 2}
    )

    def texts():
        return ResponseTexts(["P:", "Q:"], ["a", "b"], [[{"role": "user"}], []], [[7], [8, 9]], columns.of([0, 1]))

    return columns, texts


@pytest.mark.parametrize(
    ("name", "wanted", "scores"),
    [
        ("brevity", [], [-1, -1]),
        ("no_prompts", [], None),
        ("graded", ["answer"], [1, 0]),
        ("maybe", ["answer"], [2, 2]),
        ("every", ["question", "answer"], [6, 6]),
    ],
)
def test_a_function_gets_what_it_names(user_folder, two_rows, name, wanted, scores):
    columns, texts = two_rows
    source = FunctionReward.load(f"my_scores.py:{name}", columns)
    assert columns.wanted == wanted
    if scores:
        assert source.score_texts(texts()).tolist() == scores


def test_the_rollout_comes_before_columns_of_the_same_name(two_rows):
    columns, texts = two_rows
    seen = {}

    def fn(messages, prompts, token_ids, answer):
        seen.update(prompts=prompts, token_ids=token_ids, messages=messages, answer=answer)
        answer.clear()
        return [0.0, 0.0]

    wanted = wanted_by(fn, OFFERED, columns, "here")
    FunctionReward("f", fn, wanted).score_texts(given := texts())
    assert seen == {
        "prompts": ["P:", "Q:"], "token_ids": [[7], [8, 9]], "messages": [[{"role": "user"}], []], "answer": [],
    }  # fmt: skip
    assert given.columns["answer"] == ["a", "bb"]


def test_a_column_that_is_not_there_is_named_with_those_that_are(user_folder, two_rows):
    message = r"reward_fn: my_scores:wrong wants 'answers', and there are prompts, .*, messages and the data's columns "
    with pytest.raises(ConfigError, match=message + r"question, answer, each .*; did you mean answer\?"):
        FunctionReward.load("my_scores:wrong", two_rows[0])
    with pytest.raises(ConfigError, match="wants 'responses', and there are"):
        FunctionReward.load("my_scores:placed", two_rows[0])


def test_no_data_are_opened_for_a_plain_function(user_folder):
    def opened():
        raise AssertionError

    assert FunctionReward.load("my_scores:brevity", DataColumns(opened)).wanted == ("prompts", "responses")


def test_the_sample_that_raises_is_blamed_with_its_row(two_rows):
    def fn(responses, answer):
        return [1 / (len(a) - 2) for a in answer]

    source = FunctionReward("f", fn, ("responses", "answer"))
    two_rows[0].want(["answer"])
    with pytest.raises(RewardError, match=r"f raised at sample 1: ZeroDivisionError.*\(response 'b'\)"):
        source.score_texts(two_rows[1]())


def test_a_function_may_say_more_than_the_score():
    answer = [(1.0, {"length": 2, "right": True}), 0.5, [2, {"length": np.float32(4.0)}], (3, {}), 1, 1, math.inf]
    scores, metrics = FunctionReward("f", lambda prompts, responses: answer).judge(case()[1])
    assert scores.tolist() == [1.0, 0.5, 2.0, 3.0, 1.0, 1.0, math.inf]
    assert metrics == [{"length": 2.0, "right": 1.0}, {}, {"length": 4.0}, {}, {}, {}, {}]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((1.0, {"a": "b"}), r"sample 0: metric a: 'b' is not a number"),
        ((1.0, {"a": None}), "metric a: None is not a number"),
        ((1.0, {3: 1.0}), "metric 3 has no name"),
        ((None, {"a": 1.0}), "None is not a number"),
        ((1.0, 2.0), r"\(1.0, 2.0\) is not a number"),
        ({"score": 1.0}, r"\{'score': 1.0\} is not a number"),
    ],
)
def test_metrics_that_are_none(entry, message):
    with pytest.raises(RewardError, match=message):
        FunctionReward("f", lambda prompts, responses: [entry] * len(responses)).judge(case()[1])


# Config


def test_sources_in_the_order_of_the_weights(user_folder, server):
    config = RTOConfig(
        reward_fn=("my_scores:brevity",), reward_url=(server.url,), reward_timeout_s=7.0, reward_retries=2
    )
    function, url = load_reward_sources(config, columns_of())
    assert (function.name, url.name) == ("my_scores:brevity", server.url)
    assert (url.timeout_s, url.attempts) == (7.0, 3)
    assert server.bodies == []
    named = {s.name: s.score(*case()) for s in (function, url)}
    assert weighted_sum(named, (1.0, 1.0)).tolist() == [0.0] * len(WORDS)


def test_a_source_given_twice():
    with pytest.raises(ConfigError, match="http://h/x is given twice"):
        load_reward_sources(RTOConfig(reward_url=("http://h/x", "http://h/x")), columns_of())
