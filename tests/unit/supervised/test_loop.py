"""Rows of the supervised stages."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from rto_fast.data.load import Counts, PreferenceData
from rto_fast.data.tokenise import TokenLists
from rto_fast.supervised.pair_objectives import pair_rows
from rto_fast.supervised.stage import Row

ROWS, LENGTH = 2000, 300


def lists(seed: int) -> TokenLists:
    ends = np.arange(1, ROWS + 1) * LENGTH
    tokens = np.random.default_rng(seed).integers(300, 32000, ROWS * LENGTH, dtype=np.int32)
    return TokenLists(tokens, ends - LENGTH, ends)


def test_rows_leave_their_tokens_in_the_datas_arrays():
    """1.8 million tokens: as lists of Python's numbers they would take 65 MB."""
    prompts, chosen, rejected = (lists(seed) for seed in range(3))
    data = PreferenceData(prompts, chosen, rejected, list(range(ROWS)), Counts(ROWS, ROWS, {}), np.zeros(ROWS))
    tracemalloc.start()
    rows = pair_rows(data)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken < 100_000
    assert len(rows) == ROWS
    assert rows[7] == Row(prompts[7], (chosen[7], rejected[7]))
    assert list(rows[6:9]) == [rows[i] for i in (6, 7, 8)]
    assert sum(row.tokens for row in rows) == ROWS * 4 * LENGTH
    with pytest.raises(IndexError):
        rows[ROWS]
