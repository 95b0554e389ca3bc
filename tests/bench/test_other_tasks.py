"""The tasks beside medium: a truth of the whole response, and a longer horizon."""

from __future__ import annotations

import dataclasses
import functools
from statistics import mean

import pytest

from bench.claim import grid, other_tasks
from bench.claim.cells import Cell, TinyWorld, run_cell
from rto_fast.demo.config import DemoConfig
from rto_fast.demo.pipeline import MAX_PROMPT, max_length
from rto_fast.demo.tiny_task import CONTENT, KIND, make_task

SEED = 100


@pytest.fixture(scope="module")
def whole() -> other_tasks.WholeTask:
    return other_tasks.make("whole", DemoConfig(seed=SEED))[1]


def test_sides_are_as_large_in_each_kind_and_differ_by_seed(whole):
    for words in CONTENT.values():
        assert len(whole.left & set(words.split())) == len(whole.right & set(words.split())) == 2
    assert not whole.left & whole.right
    assert whole.left != other_tasks.make("whole", DemoConfig(seed=SEED + 1))[1].left


def test_the_reward_follows_the_rule_and_is_paid_at_the_end(whole):
    rows = whole.texts(300, 0)
    for r in rows:
        words = {w for w in r["response"].replace(".", " ").split() if w in KIND}
        rewards = whole.token_rewards(whole.encode(r["prompt"]), whole.encode(r["response"]))
        assert set(rewards[:-1]) <= {0.0}
        assert rewards[-1] == 2 * min(len(words & whole.left), len(words & whole.right)), r
    assert whole.token_rewards(whole.encode(rows[0]["prompt"]), []) == []


def test_what_a_word_is_worth_depends_on_the_rest(whole):
    """A word of the left side earns 2 where the right side has one word more, and nothing where it has none."""

    def pick(kind: str, side: frozenset[str]) -> str:
        return next(w for w in CONTENT[kind].split() if w in side)

    neither = frozenset(KIND) - whole.left - whole.right
    worth = {}
    for name, side in (("right", whole.right), ("left", whole.left)):
        first = f"It {pick('MOVE', neither)} to the {pick('PLACE', side)}."
        second = f"There it {pick('TAKE', neither)} a {pick('LOOK', neither)}"
        with_word, without = (
            whole.true_reward("Once there was a proud fox.", f"{first} {second} {pick('THING', words)}.")
            for words in (whole.left, neither)
        )
        worth[name] = with_word - without
    assert worth == {"right": 2.0, "left": 0.0}


def test_longer_answers_repetition_and_lists_of_words_do_not_pay(whole):
    prompt, story = "Once there was a proud fox.", whole.texts(1, 0)[0]["response"]
    reward = whole.true_reward(prompt, story)
    assert whole.true_reward(prompt, f"{story} {story}") <= reward, "no word counts twice"
    assert whole.true_reward(prompt, " ".join(KIND)) <= 2, "the grammar allows hardly any word of a list"


def test_long_stories_fit_and_go_on_for_a_hundred_tokens():
    settings, task = other_tasks.make("long", DemoConfig(seed=SEED))
    lengths = [len(task.encode(r["response"])) for r in task.texts(500, 1)]
    assert min(lengths) >= 100
    assert max(lengths) < settings.max_response_length
    assert mean(lengths) > 140
    assert max_length(settings) == MAX_PROMPT + settings.max_response_length == task.tokenizer.model_max_length
    assert task.table == make_task(SEED).table, "the rule is medium's"


def test_the_demos_models_keep_their_positions():
    assert max_length(DemoConfig()) == 128


@pytest.mark.slow
@pytest.mark.parametrize("task", other_tasks.TASKS)
def test_the_grid_runs_them(task, tmp_path, one_rank):
    """World, oracle and RTO on few rows; models are judged on openings that no stage has seen."""
    config = grid.ClaimConfig(iterations=1, fractions=(), corpus_rows=160, pairs=48, eval_prompts=16)
    make_world = functools.partial(grid.make_world, tmp_path, config)
    found = run_cell(Cell(task, 0), make_world, tmp_path, "")
    assert found["judgement"]["win_rate"] == 0.5
    assert -1 <= found["quality"]["rm_rm2"] <= 1
    rto = run_cell(Cell(task, 0, "RTO", 1e-4), make_world, tmp_path, "")
    assert rto["curve"]["samples"] == [64]
    world = make_world(task, 0)
    assert isinstance(world, TinyWorld)
    assert world.rl(True).max_response_length == (other_tasks.LONG_RESPONSE if task == "long" else 48)
    asked = {world.task.tokenizer.decode(p, skip_special_tokens=True) for p in world.judge_one.base.prompts()}
    rows = dataclasses.replace(world.task, openings="training").prompts(2000, 2)
    assert not asked & {r["prompt"] for r in rows}
