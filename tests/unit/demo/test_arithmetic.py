"""The embedded sums: problems in GSM8K's format, none of them on both sides, and a tokenizer of characters."""

from __future__ import annotations

import dataclasses

import pytest

from rto_fast.demo import arithmetic
from rto_fast.demo.config import ArithmeticConfig
from rto_fast.errors import ConfigError
from rto_fast.scoring.math_answers import last_number


def test_problems_of_two_kinds():
    train, held_out = arithmetic.problems(ArithmeticConfig())
    assert (len(train), len(held_out)) == (120, 60)
    assert not {r["question"] for r in train} & {r["question"] for r in held_out}
    for row in (*train, *held_out):
        a, b = map(int, row["question"].removeprefix("What is ").removesuffix("?").split(" + "))
        assert row["answer"] == f"{a} + {b} = {a + b}\n#### {a + b}"
    assert arithmetic.problems(ArithmeticConfig(seed=1))[1] != held_out


def test_the_corpus_is_wrong_as_often_as_it_should_be():
    config = ArithmeticConfig(wrong_share=0.25)
    train, held_out = arithmetic.problems(config)
    rows, truth = arithmetic._corpus(config, train), {r["question"]: r["answer"] for r in train}
    scores = last_number([r["response"] for r in rows], [truth[r["prompt"]] for r in rows])
    assert 0.73 < sum(score for score, _ in scores) / len(rows) < 0.77
    assert not {r["prompt"] for r in rows} & {r["question"] for r in held_out}


def test_text_survives_tokenisation():
    tokenizer = arithmetic.character_tokenizer()
    text = "What is 34 + 3? 34 + 3 = 37\n#### 37"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize(("name", "value"), [("held_out", 180), ("wrong_share", 1.5), ("iterations", 0)])
def test_settings_that_cannot_work(name, value):
    with pytest.raises(ConfigError, match=name):
        dataclasses.replace(ArithmeticConfig(), **{name: value}).validate()
