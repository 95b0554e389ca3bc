"""Rewards for problems with a known answer: 1 where a response gives it, else 0.

The answer stands in the column `answer`, behind the last "####" where there is one (as in GSM8K).
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from rto_fast.errors import RewardError

MARK = "####"
NUMBER = re.compile(r"(?<![\d.])-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
Judgement = tuple[float, dict[str, float]]


def correct(responses: list[str], answer: list[Any]) -> list[Judgement]:
    """By math-verify: what a response boxes, or says last, must equal the answer (1/2, 0.5 and \\frac{1}{2} are one).

    Metrics: `answered`, whether the response holds an answer; `unreadable`, whether the data's could not be read, so
    that no response is right.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise RewardError(
            "math-verify is not installed; pip install 'rto-fast[math]', or compare numbers alone by "
            "rto_fast.scoring.math_answers:last_number"
        ) from None

    def judge(response: str, wanted: str) -> Judgement:
        gold, found = parse(wanted) or parse(f"${wanted}$"), parse(response)
        right = bool(gold) and bool(found) and verify(gold, found)
        return float(right), {"answered": float(bool(found)), "unreadable": float(not gold)}

    return [judge(r, wanted_answer(a)) for r, a in zip(responses, answer, strict=True)]


def last_number(responses: list[str], answer: list[Any]) -> list[Judgement]:
    """By the last number of a response and of the answer; decimals, and commas between thousands. Metrics as above."""

    def judge(response: str, wanted: str) -> Judgement:
        gold, found = _number(wanted), _number(response)
        right = gold is not None and found == gold
        return float(right), {"answered": float(found is not None), "unreadable": float(gold is None)}

    return [judge(r, wanted_answer(a)) for r, a in zip(responses, answer, strict=True)]


def wanted_answer(answer: Any) -> str:
    """The answer itself, of a solution that may end in "#### 42"."""
    return "" if answer is None else str(answer).rpartition(MARK)[2].strip()


def _number(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
