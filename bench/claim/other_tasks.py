"""Tasks that are not the token reward's own model: one paid for the response as a whole, one with a longer horizon.

whole   the truth is no sum over tokens: every seed puts two of each kind's six words on a left side and two on a right
        one, and the reward is 2 min(left, right), each word of the response counted once. A word of the side that has
        more is worth nothing, so that what a word earns depends on the whole response, words behind it included.
long    medium's rule in stories of 14 to 24 middle sentences: some 100 to 190 tokens instead of 28.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

from rto_fast.demo.config import DemoConfig
from rto_fast.demo.pipeline import max_length
from rto_fast.demo.tiny_task import CONTENT, Difficulty, TinyTask, make_task

TASKS = ("whole", "long")
LONG = Difficulty(middles=(14, 24), lag=1, groups=2, earning=1, active=1.0)
LONG_RESPONSE = 224
"""Tokens sampled at most; the longest story of the corpus has some 210."""


@dataclass(frozen=True)
class WholeTask(TinyTask):
    """The grammar of `TinyTask`; the truth is the response's own, paid at its last token."""

    left: frozenset[str] = frozenset()
    right: frozenset[str] = frozenset()
    """Words of the two sides."""

    def told(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> set[str]:
        """The response's content words that count: where the grammar allows them, in as many sentences as a story may
        have."""
        everything = dataclasses.replace(self, table=_AlwaysOne())
        tokens = self.tokenizer.convert_ids_to_tokens([int(i) for i in response_ids])
        paid = TinyTask.token_rewards(everything, prompt_ids, response_ids)
        return {word for word, reward in zip(tokens, paid, strict=True) if reward}

    def token_rewards(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """0 for each token but the last, which has the response's reward; empty for an empty response."""
        told = self.told(prompt_ids, response_ids)
        reward = 2 * min(len(told & self.left), len(told & self.right))
        return [0.0] * (len(response_ids) - 1) + [float(reward)] * bool(len(response_ids))


class _AlwaysOne(dict[tuple[str, str], float]):
    """A reward table in which every pair earns 1."""

    def get(self, key: tuple[str, str], default: float = 0.0) -> float:  # type: ignore[override]
        return 1.0


def make(name: str, settings: DemoConfig) -> tuple[DemoConfig, TinyTask]:
    """The settings and the task of a seed."""
    medium = make_task(settings.seed)
    if name == "long":
        settings = dataclasses.replace(settings, max_response_length=LONG_RESPONSE)
        medium.tokenizer.model_max_length = max_length(settings)
        return settings, dataclasses.replace(medium, difficulty=LONG)
    rng = random.Random(f"{settings.seed} sides")
    drawn = [rng.sample(words.split(), 4) for words in CONTENT.values()]
    left, right = (frozenset(w for words in drawn for w in words[half]) for half in (slice(2), slice(2, 4)))
    fields = {f.name: getattr(medium, f.name) for f in dataclasses.fields(medium)}
    return settings, WholeTask(**fields, left=left, right=right)
