"""What token rewards lean on, and whether they agree with the score.

    share of |reward|   sum over tokens of one kind of |reward|, of the sum over all
    within a prompt     of deviations from the mean of the prompt's responses, where it has several
    prefix difference   a reward model's number behind a token less that before it

All of it on rewards as they are paid: scaled and clipped.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rto_fast.report.samples import ReportSample, special_text

KINDS = ("word start", "word inside", "number", "punctuation", "whitespace", "special")
PARTS = 10
"""Equal parts of a response, by which places are told."""
AT_BOUND = 1 - 1e-6
"""Of the bound: a reward this large was clipped. fp32 knows no better."""


@dataclass(frozen=True)
class Response:
    """A response of H tokens, as an audit sees it; raises ValueError when a list has another length."""

    prompt: str
    """What tells its prompt from others."""
    texts: Sequence[str]
    """[H] text of each token."""
    special: Sequence[bool]
    """[H] whether it is a special token."""
    rewards: Sequence[float]
    """[H] token rewards, scaled and clipped."""
    score: float = math.nan
    """Of the whole response; NaN = not known."""
    differences: Sequence[float] | None = None
    """[H] prefix differences of a reward model."""

    def __post_init__(self) -> None:
        for name in ("special", "rewards", "differences"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.texts):
                raise ValueError(f"Response.{name}: {len(values)} values for {len(self.texts)} tokens")


@dataclass(frozen=True)
class Group:
    """Tokens of one kind, or of one place."""

    name: str
    tokens: int
    token_share: float
    """Of all tokens."""
    reward_share: float
    """Of the sum of |reward|."""
    mean: float
    """Mean reward of a token."""
    clipped: float | None
    """Share of these tokens at the bound; None where the bound is not known, or there is none."""


@dataclass(frozen=True)
class Agreement:
    """Correlations (Pearson); None where too few values differ."""

    score: float | None
    """A response's sum of token rewards with its score."""
    score_within_prompt: float | None
    """The same of deviations from the prompt's mean, over prompts with several responses."""
    prompts: int
    """How many those are."""
    differences: float | None = None
    """Token rewards with the reward model's prefix differences."""
    differences_before_last: float | None = None
    """The same without each response's last token, where a reward model was trained to speak."""


@dataclass(frozen=True)
class Audit:
    """The figures of some responses."""

    responses: int
    tokens: int
    not_finite: int
    """Responses that were left out because a token reward, or a prefix difference, was not finite."""
    clipped: float | None
    """Share of all tokens at the bound; None as in `Group`."""
    kinds: list[Group] = field(default_factory=list)
    """In the order of KINDS, those that occur."""
    places: list[Group] = field(default_factory=list)
    """PARTS of them, from a response's start to its end, those that occur."""
    agreement: Agreement = field(default_factory=lambda: Agreement(None, None, 0))


def audit(responses: Sequence[Response], bound: float = 0.0) -> Audit | None:
    """The audit of responses whose token rewards were clipped to +-bound (0 = not known, or none).

    None where no token earns anything.
    """
    finite = [r for r in responses if all(map(math.isfinite, [*r.rewards, *(r.differences or ())]))]
    kinds: dict[str, list[float]] = defaultdict(list)
    places: dict[str, list[float]] = defaultdict(list)
    for one in finite:
        for i, (kind, reward) in enumerate(zip(kinds_of(one.texts, one.special), one.rewards, strict=True)):
            kinds[kind].append(reward)
            places[_place(i, len(one.texts))].append(reward)
    flat = [reward for one in finite for reward in one.rewards]
    if not any(flat):
        return None
    return Audit(
        responses=len(finite), tokens=len(flat), not_finite=len(responses) - len(finite),
        clipped=_at_bound(flat, bound),
        kinds=[_group(name, kinds[name], flat, bound) for name in KINDS if name in kinds],
        places=[_group(name, places[name], flat, bound) for name in PLACES if name in places],
        agreement=_agreement(finite),
    )  # fmt: skip


PLACES = tuple(f"{100 * i // PARTS}–{100 * (i + 1) // PARTS} %" for i in range(PARTS))


def _place(i: int, length: int) -> str:
    return PLACES[PARTS * i // length]


def kinds_of(texts: Sequence[str], special: Sequence[bool]) -> Iterator[str]:
    """The kind of each token of a response.

    A token with letters starts a word where its first one follows no letter, digit or apostrophe; part of a character,
    which has no text of its own, is inside one. One with digits and no letters is a number, one with neither
    punctuation.
    """
    before = ""
    for text, is_special in zip(texts, special, strict=True):
        if is_special:
            yield "special"
            before = ""
            continue
        letter = next((i for i, c in enumerate(text) if c.isalpha()), None)
        if letter is not None and not _byte(text):
            last = (before + text[:letter])[-1:]
            yield "word inside" if last.isalnum() or last in _APOSTROPHES else "word start"
        elif any(map(str.isdigit, text)) and not _byte(text):
            yield "number"
        elif not text or "\ufffd" in text or _byte(text):
            yield "word inside"
        else:
            yield "whitespace" if text.isspace() else "punctuation"
        before = text[-1:] or before


_APOSTROPHES = ("'", "’")


def _byte(text: str) -> bool:
    """Whether a token is a byte of a character, as SentencePiece writes it."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _group(name: str, rewards: Sequence[float], everything: Sequence[float], bound: float) -> Group:
    total = math.fsum(map(abs, everything))
    return Group(
        name=name, tokens=len(rewards), token_share=len(rewards) / len(everything),
        reward_share=math.fsum(map(abs, rewards)) / total, mean=statistics.fmean(rewards),
        clipped=_at_bound(rewards, bound),
    )  # fmt: skip


def _at_bound(rewards: Sequence[float], bound: float) -> float | None:
    return statistics.fmean(abs(r) >= AT_BOUND * bound for r in rewards) if bound else None


def _agreement(responses: Sequence[Response]) -> Agreement:
    scored = [(r.prompt, math.fsum(r.rewards), r.score) for r in responses if math.isfinite(r.score)]
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for prompt, total, score in scored:
        groups[prompt].append((total, score))
    several = [group for group in groups.values() if len(group) > 1]
    within = [pair for group in several for pair in zip(*map(_centred, zip(*group, strict=True)), strict=True)]
    pairs = [list(zip(r.rewards, r.differences, strict=True)) for r in responses if r.differences is not None]
    return Agreement(
        score=correlation([(total, score) for _, total, score in scored]),
        score_within_prompt=correlation(within), prompts=len(several),
        differences=correlation([p for of_one in pairs for p in of_one]),
        differences_before_last=correlation([p for of_one in pairs for p in of_one[:-1]]),
    )  # fmt: skip


def _centred(values: Sequence[float]) -> list[float]:
    mean = statistics.fmean(values)
    return [v - mean for v in values]


def correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's, or None where there are fewer than two pairs or one side is constant."""
    try:
        return statistics.correlation(*zip(*pairs, strict=True)) if pairs else None
    except statistics.StatisticsError:
        return None


def of_samples(samples: Sequence[ReportSample]) -> list[Response]:
    """The responses of a samples.jsonl."""
    return [Response(s.prompt, s.tokens, [special_text(t) for t in s.tokens], s.dpo_reward, s.score) for s in samples]


def bound_of(config: dict) -> float:
    """The bound of a run's token rewards; 0 where there is none, or where several sources are bounded one by one.

    config: of a run.json.
    """
    alone = len(config.get("token_reward") or ("dpo",)) == 1
    return float(config.get("dpo_clip") or 0.0) if alone else 0.0


GROUP_COLUMNS = ("tokens", "of tokens", "of |reward|", "mean reward", "clipped")
Grid = tuple[str, list[str], list[list[str]], str]
"""Title, column names, rows, note."""


def grids(found: Audit) -> list[Grid]:
    """The audit as tables of text."""
    said = found.agreement
    left = f" {found.not_finite} responses were left out: not finite." if found.not_finite else ""
    head = f"{found.responses:,} responses, {found.tokens:,} tokens.{left}"
    rows = [
        ["sum of token rewards with score", _number(said.score)],
        [f"the same within a prompt ({said.prompts:,} with several responses)", _number(said.score_within_prompt)],
    ]
    if said.differences is not None:
        rows += [
            ["token reward with the reward model's prefix difference", _number(said.differences)],
            ["the same without each last token", _number(said.differences_before_last)],
        ]
    return [
        ("Token rewards by kind of token", ["kind", *GROUP_COLUMNS], list(map(_row, found.kinds)), head),
        ("Token rewards by place in the response", ["place", *GROUP_COLUMNS], list(map(_row, found.places)), ""),
        ("Agreement", ["correlation", "r"], rows, ""),
    ]


def _row(group: Group) -> list[str]:
    clipped = "" if group.clipped is None else f"{group.clipped:.1%}"
    shares = f"{group.token_share:.1%}", f"{group.reward_share:.1%}"
    return [group.name, f"{group.tokens:,}", *shares, f"{group.mean:+.4f}".replace("-", "−"), clipped]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")
