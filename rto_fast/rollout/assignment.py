"""Which engine samples what, and when it may stop.

Where more prompts are drawn than the batch holds (`rollout_oversample`), every engine has a quota of whole prompts and
stops as soon as it is filled: what would have been the longest responses is never finished.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rto_fast.contract import Request
from rto_fast.models.packing import balance


@dataclass(frozen=True)
class Share:
    """What one engine is asked in an iteration."""

    places: list[int]
    """Of its requests among all of the iteration, ascending."""
    requests: list[Request]
    keep: int | None
    """Prompts that are enough; None = all."""

    def kept(self, sample_indices: Sequence[int]) -> list[int]:
        """Places of the requests whose prompts are among `sample_indices`."""
        there = set(sample_indices)
        return [place for place, q in zip(self.places, self.requests, strict=True) if q.sample_index in there]


def share_out(requests: Sequence[Request], max_tokens: int, engines: int, keep: int | None = None) -> list[Share]:
    """One share an engine, balanced by the most tokens that each can come to.

    requests: those of one prompt side by side; keep: prompts that are enough over all engines, None = all. With it a
    prompt's responses stay on one engine, and quotas are in proportion to the engines' prompts.
    """
    prompts = [list(group) for _, group in groupby(range(len(requests)), lambda i: requests[i].sample_index)]
    units = prompts if keep is not None else [[i] for i in range(len(requests))]
    dealt = balance([sum(len(requests[i].prompt) + max_tokens for i in unit) for unit in units], engines)
    quotas: list[int | None] = [None] * engines
    if keep is not None:
        quotas = [*quotas_of([len(share) for share in dealt], keep)]
    places = [sorted(i for unit in share for i in units[unit]) for share in dealt]
    return [Share(at, [requests[i] for i in at], quota) for at, quota in zip(places, quotas, strict=True)]


def quotas_of(counts: Sequence[int], keep: int) -> list[int]:
    """`keep` split in proportion to `counts`, never more than each count: rounded down, the rest to the largest parts
    that were cut off."""
    total = max(1, sum(counts))
    quotas = [count * keep // total for count in counts]
    first = sorted(range(len(counts)), key=lambda e: (-(counts[e] * keep % total), e))
    for engine in first[: keep - sum(quotas)]:
        quotas[engine] += 1
    return quotas


class Tally:
    """Counts the responses that have ended, prompt by prompt."""

    def __init__(self, requests: Sequence[Request], keep: int | None) -> None:
        """keep: prompts that are enough; None = all."""
        self.requests = requests
        self.open = Counter(q.sample_index for q in requests)
        self.keep = len(self.open) if keep is None else keep
        self.whole = 0

    def end(self, request: Request) -> None:
        """A response to `request` has ended."""
        self.open[request.sample_index] -= 1
        self.whole += not self.open[request.sample_index]

    @property
    def enough(self) -> bool:
        return self.whole >= self.keep

    def kept(self, lens: Sequence[int]) -> list[int]:
        """Which requests to keep, ascending; lens: response tokens of each.

        Of the prompts that have all their responses, those whose longest one is shortest; of equals the earlier.
        """
        longest: dict[int, int] = {}
        for q, length in zip(self.requests, lens, strict=True):
            longest[q.sample_index] = max(length, longest.get(q.sample_index, 0))
        whole = [prompt for prompt, left in self.open.items() if not left]
        chosen = set(sorted(whole, key=longest.__getitem__)[: self.keep])
        return [i for i, q in enumerate(self.requests) if q.sample_index in chosen]
