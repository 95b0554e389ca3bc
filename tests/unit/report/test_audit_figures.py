"""What token rewards lean on: every figure against one worked out by hand, and what cannot be told."""

from __future__ import annotations

import math

import pytest
from test_page import Page, sample

from rto_fast.logs.files import RUN
from rto_fast.report.audit import Response, audit, bound_of, correlation, grids, kinds_of, of_samples
from rto_fast.report.page import report_run
from rto_fast.report.samples import append_samples, special_text

INSIDE, START = "word inside", "word start"


@pytest.mark.parametrize(
    ("texts", "kinds"),
    [
        (["Once", " upon", " a", "\n", "time", "."], [START, START, START, "whitespace", START, "punctuation"]),
        (["un", "likely", "-", "est", " don", "'t", " 3", "rd", " 2.5", "%"],
         [START, INSIDE, "punctuation", START, START, INSIDE, "number", INSIDE, "number", "punctuation"]),
        ([" (", "see", " “No", "”,", "\n\n", "\t", "Ünder", "ô", "²"],
         ["punctuation", START, START, "punctuation", "whitespace", "whitespace", START, INSIDE, "number"]),
        (["The", "\n", "re"], [START, "whitespace", START]),
        (["<0xE3>", "\ufffd", "", "日本"], [INSIDE, INSIDE, INSIDE, START]),
        (["dog", "", "s"], [START, INSIDE, INSIDE]),
    ],
)  # fmt: skip
def test_kinds_of_tokens(texts, kinds):
    assert list(kinds_of(texts, [False] * len(texts))) == kinds


def test_a_special_token_is_one_whatever_its_text_and_ends_a_word():
    found = kinds_of(["end", "</s>", "s", "<eos>"], [False, True, False, False])
    assert list(found) == [START, "special", START, START]
    assert [special_text(t) for t in ("<|eot_id|>", "[SEP]", "<a b>", "[x]")] == [True, True, False, False]


def four() -> list[Response]:
    """Two prompts; the second of "p" has ten times the first one's score, "q" stands alone."""
    plain = [False, False, True]
    return [
        Response("p", ["A", ".", "</s>"], plain, [0.1, -0.1, 0.0], 1.0, [0.5, -0.5, 4.0]),
        Response("p", ["A", ".", "</s>"], plain, [0.1, 0.1, 0.05], 10.0, [1.0, 0.0, -2.0]),
        Response("q", ["A"], [False], [-0.05], 100.0, [-1.0]),
        Response("r", [], [], [], 3.0, []),
    ]


def test_shares_of_kinds_and_the_bound():
    found = audit(four(), bound=0.1)
    assert (found.responses, found.tokens, found.not_finite) == (4, 7, 0)
    assert found.clipped == pytest.approx(4 / 7)
    total = 0.1 + 0.1 + 0.0 + 0.1 + 0.1 + 0.05 + 0.05
    start, punctuation, special = found.kinds
    assert [g.name for g in found.kinds] == [START, "punctuation", "special"]
    assert (start.tokens, start.token_share, start.clipped) == (3, pytest.approx(3 / 7), pytest.approx(2 / 3))
    assert start.reward_share == pytest.approx(0.25 / total)
    assert start.mean == pytest.approx(0.15 / 3)
    assert punctuation.mean == pytest.approx(0.0)
    assert punctuation.reward_share == pytest.approx(0.2 / total)
    assert special.reward_share == pytest.approx(0.05 / total)
    assert sum(g.reward_share for g in found.kinds) == pytest.approx(1)


def test_shares_of_places():
    """Three tokens stand in the first, fourth and seventh tenth, a single one in the first."""
    found = audit(four()).places
    assert [(g.name, g.tokens) for g in found] == [("0–10 %", 3), ("30–40 %", 2), ("60–70 %", 2)]
    assert [g.reward_share for g in found] == pytest.approx([0.5, 0.4, 0.1])
    even = audit([Response("p", ["a"] * 20, [False] * 20, [0.1] * 20)]).places
    assert [g.tokens for g in even] == [2] * 10
    assert [g.name for g in even][-1] == "90–100 %"


def test_agreement_with_score_and_prefix_differences():
    found = audit(four()).agreement
    totals, scores = [0.0, 0.25, -0.05, 0.0], [1.0, 10.0, 100.0, 3.0]
    assert found.score == pytest.approx(pearson(totals, scores))
    assert (found.score_within_prompt, found.prompts) == (pytest.approx(1.0), 1)
    rewards = [0.1, -0.1, 0.0, 0.1, 0.1, 0.05, -0.05]
    steps = [0.5, -0.5, 4.0, 1.0, 0.0, -2.0, -1.0]
    assert found.differences == pytest.approx(pearson(rewards, steps))
    assert found.differences_before_last == pytest.approx(pearson([0.1, -0.1, 0.1, 0.1], [0.5, -0.5, 1.0, 0.0]))


def pearson(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    cov = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return cov / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def test_within_a_prompt_the_prompts_own_level_is_gone():
    """Prompts that are good at both raise the correlation over all; inside each the two are opposed."""

    def one(prompt, reward, score):
        return Response(prompt, ["a"], [False], [reward], score)

    rows = [one("p", 0.1, 1.0), one("p", 0.2, 0.0), one("q", 1.1, 11.0), one("q", 1.2, 10.0)]
    found = audit(rows).agreement
    assert found.score > 0.9
    assert (found.score_within_prompt, found.prompts) == (pytest.approx(-1.0), 2)


def test_what_cannot_be_told_is_none():
    assert correlation([]) is None
    assert correlation([(1.0, 2.0)]) is None
    assert correlation([(1.0, 2.0), (1.0, 3.0)]) is None
    alone = audit([Response("p", ["a"], [False], [0.1])])
    assert alone.clipped is None
    assert alone.kinds[0].clipped is None
    assert (alone.agreement.score, alone.agreement.score_within_prompt, alone.agreement.prompts) == (None, None, 0)
    assert alone.agreement.differences is None
    assert audit([]) is None
    assert audit([Response("p", ["a"], [False], [0.0], 1.0)]) is None


def test_responses_that_are_not_finite_are_left_out_and_counted():
    bad = [Response("p", ["a"], [False], [math.nan], 1.0), Response("p", ["a"], [False], [0.1], 1.0, [math.inf])]
    found = audit([*four(), *bad])
    assert (found.responses, found.not_finite) == (4, 2)
    assert "2 responses were left out" in grids(found)[0][3]
    no_score = audit([*four(), Response("p", ["a"], [False], [0.1])]).agreement
    assert no_score.score == audit(four()).agreement.score


def test_lists_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"Response\.rewards: 1 values for 2 tokens"):
        Response("p", ["a", "b"], [False, False], [0.1])
    with pytest.raises(ValueError, match=r"Response\.differences: 0 values for 1 tokens"):
        Response("p", ["a"], [False], [0.1], 1.0, [])


def test_the_bound_of_a_run():
    assert bound_of({"dpo_clip": 0.05, "token_reward": ["dpo"]}) == 0.05
    assert bound_of({"dpo_clip": 0.05, "token_reward": ["dpo", "endogenous"]}) == 0.0  # each is clipped alone
    assert bound_of({"dpo_clip": 0.0, "token_reward": ["dpo"]}) == 0.0
    assert bound_of({}) == 0.0


def test_the_report_audits_all_kept_responses_and_not_only_those_shown(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/score": 0.5}\n')
    (tmp_path / RUN).write_text('{"stage": "RTO", "config": {"dpo_clip": 0.01, "token_reward": ["dpo"]}}')
    append_samples(tmp_path / "samples.jsonl", [sample(), sample(step=2), sample(step=3)])
    page = Page(report_run(tmp_path, limit=1))
    text = (tmp_path / "report.html").read_text()
    assert "token-rewards" in page.ids
    assert "3 responses, 12 tokens." in text
    assert len(page.all("article")) == 1
    assert "100.0%" in text  # all of -0.01 at a bound of 0.01


def test_a_run_without_token_rewards_has_no_such_section(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/score": 0.5}\n')
    append_samples(tmp_path / "samples.jsonl", [sample(dpo_reward=[0.0] * 4)])
    assert "token-rewards" not in Page(report_run(tmp_path)).ids


def test_samples_become_responses():
    (one,) = of_samples([sample(dpo_reward=[0.1, 0.2, 0.3, 0.4])])
    assert list(one.special) == [False, False, False, True]
    assert (one.rewards, one.score) == ([0.1, 0.2, 0.3, 0.4], 1.25)
