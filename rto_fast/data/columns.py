"""Columns of the prompts' rows, for rewards that compare with an answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from rto_fast.config import RTOConfig
from rto_fast.data.sources import Table, open_source
from rto_fast.data.tokenise import in_turns


class DataColumns:
    """Columns of a data set, read row by row; it is opened when somebody asks which there are."""

    def __init__(self, open_table: Callable[[], Table]) -> None:
        self._open = open_table
        self.wanted: list[str] = []
        """Those that `of` reads."""

    @classmethod
    def of_prompts(cls, config: RTOConfig) -> DataColumns:
        """Of the rows of `config.data`."""
        return cls(lambda: in_turns(lambda: open_source("data", config.data, config.data_split)[1](config.max_rows)))

    @cached_property
    def table(self) -> Table:
        """Opened at the first use, which is collective. Raises DataError."""
        return self._open()

    @property
    def names(self) -> list[str]:
        return self.table.columns

    def want(self, names: Sequence[str]) -> None:
        """Has `of` read these, too; each must be one of `names`."""
        self.wanted += [name for name in names if name not in self.wanted]

    def of(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """The wanted columns of some rows (0-based, of the data set), as the data have them; None where a row of JSON
        lacks one."""
        if not self.wanted or not rows:
            return {name: [] for name in self.wanted}
        if self.table.as_text:
            found = [json.loads(text) for text in self.table.rows[list(rows)]["json"]]
            return {name: [row.get(name) for row in found] for name in self.wanted}
        picked = self.table.rows.select_columns(self.wanted)[list(rows)]
        return {name: list(picked[name]) for name in self.wanted}
