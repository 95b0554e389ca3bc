"""Orders of rows that are the same for the same seed, in every process."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence


@functools.lru_cache(maxsize=4)
def permutation(count: int, key: str) -> Sequence[int]:
    """A shuffle of range(count), the same for the same arguments in every process."""
    order = list(range(count))
    random.Random(key).shuffle(order)
    return tuple(order)


def rows_of_step(key: str, rows: int, size: int, step: int) -> list[int]:
    """The rows of an optimiser step: each epoch in a new order, the last batch running into the next epoch's.

    A function of the step alone: a resumed run takes the rows that the first would have taken.
    """
    out = []
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, rows)
        out.append(permutation(rows, f"{key}/{epoch}")[place])
    return out
