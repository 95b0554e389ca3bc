"""Tokenised rows, from the cache where they are there.

They are kept in `<HF_DATASETS_CACHE>/rto_fast`, an Arrow file for each combination of data, tokenizer, template, keys
and row limit.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
import jinja2
import numpy as np
import pyarrow as pa
import torch.distributed as dist
import transformers

from rto_fast.config import RunConfig
from rto_fast.data import chat_template, row_formats
from rto_fast.data.row_formats import NOT_TEXT, REFUSED, BadRow, row_of
from rto_fast.data.sources import TOO_DEEP, Table, open_source
from rto_fast.data.tokenizer import tokenizer_hash
from rto_fast.errors import DataError

Loaded = TypeVar("Loaded")
SPLITS = {"eval_data": "eval_split", "ptx_data": "ptx_split"}
"""Settings that name the split of a data set other than `data`."""
PARALLEL_ROWS = 10_000
"""Rows from which starting worker processes pays."""
MAX_WORKERS = 16


class TokenLists(Sequence[list[int]]):
    """A list of token-id lists in one int32 array: 4 bytes a token where Python's own lists take about 36."""

    def __init__(self, flat: np.ndarray, starts: np.ndarray, ends: np.ndarray):
        self.flat, self.starts, self.ends = flat, starts, ends

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index):
        """An int gives a list[int], a slice another TokenLists."""
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return self.flat[self.starts[index] : self.ends[index]].tolist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"TokenLists({len(self)} rows, {int(self.lengths.sum())} tokens)"

    @property
    def lengths(self) -> np.ndarray:
        """[rows] int64 tokens."""
        return self.ends - self.starts

    def take(self, index: Sequence[int] | np.ndarray) -> TokenLists:
        """The rows at `index`, sharing the tokens."""
        index = np.asarray(index, dtype=np.int64)
        return TokenLists(self.flat, self.starts[index], self.ends[index])

    def cut(self, limits: np.ndarray) -> TokenLists:
        """Every row without what lies beyond its limit ([rows], tokens)."""
        return TokenLists(self.flat, self.starts, np.minimum(self.ends, self.starts + limits))


Encode = partial[dict[str, Any]]
"""(row, its keys) -> the fields of row_formats.encoded; raises BadRow."""
Columns = partial[list[str]]
"""(table) -> the keys that an encoder reads; raises DataError."""


@dataclass(frozen=True)
class TokenRows:
    """All rows of a data set, tokenised or with the reason why not."""

    argument: str
    name: str
    prompt_ids: TokenLists
    first_ids: TokenLists
    second_ids: TokenLists
    texts: list[str] = field(repr=False)
    prompts: list[str] = field(repr=False)
    reasons: list[str] = field(repr=False)
    details: list[str] = field(repr=False)
    lines: list[int] = field(repr=False)
    margins: np.ndarray = field(repr=False)
    """[rows] float64: by how much the data say that chosen should win; 0 where it is not read."""

    @classmethod
    def of(cls, argument: str, name: str, table: pa.Table) -> TokenRows:
        def tokens(column: str) -> TokenLists:
            chunks = table.column(column).chunks
            lengths = np.concatenate([np.asarray(c.value_lengths()) for c in chunks]).astype(np.int64)
            ends = np.cumsum(lengths)
            return TokenLists(np.concatenate([np.asarray(c.flatten()) for c in chunks]), ends - lengths, ends)

        text, prompt, reason, detail, line = (table.column(c).to_pylist() for c in _PLAIN_COLUMNS)
        return cls(
            argument, name, tokens("prompt_ids"), tokens("first_ids"), tokens("second_ids"),
            text, prompt, reason, detail, line, table.column("margin").to_numpy(),
        )  # fmt: skip

    def at(self, row: int) -> str:
        return place_of(self.argument, self.name, row, self.lines[row])


def place_of(argument: str, name: str, row: int, line: int) -> str:
    """Where a row stands, for messages: its 1-based line, or the 0-based row where there are no lines."""
    return f"{argument}: {name!r}, " + (f"line {line}" if line else f"row {row} (from 0)")


_PLAIN_COLUMNS = ("text", "prompt", "reason", "detail", "line")
_FEATURES = datasets.Features(
    {k: datasets.List(datasets.Value("int32")) for k in ("prompt_ids", "first_ids", "second_ids")}
    | {k: datasets.Value("string") for k in _PLAIN_COLUMNS[:-1]}
    | {"line": datasets.Value("int64"), "margin": datasets.Value("float64")}
)


def load_rows(config: RunConfig, argument: str, name: str, encode: Encode, columns: Columns) -> TokenRows:
    """Tokenises a data set, or takes its rows from the cache; by `in_turns`."""
    return in_turns(lambda: _load_here(config, argument, name, encode, columns))


def in_turns(load: Callable[[], Loaded]) -> Loaded:
    """What `load` gives, on every rank.

    With several ranks the first of each machine goes ahead and the others read what it wrote; an error of one
    is raised by all.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return load()
    loaded, error = None, None
    if int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0:
        try:
            loaded = load()
        except Exception as e:  # the other ranks wait: they must hear of any failure
            error = e
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error and (str(error) or repr(error)))
    if error:
        raise error
    if any(errors):
        raise DataError(next(e for e in errors if e))
    return load() if loaded is None else loaded


def _load_here(config: RunConfig, argument: str, name: str, encode: Encode, columns: Columns) -> TokenRows:
    split = getattr(config, SPLITS.get(argument, ""), "")
    fingerprint, read = open_source(argument, name, split or config.data_split)
    if not config.data_cache:
        with tempfile.TemporaryDirectory() as scratch:
            return TokenRows.of(argument, name, _tokenise(config, read, encode, columns, scratch))
    identity = (
        fingerprint, config.max_rows, columns.func.__name__, sorted(columns.keywords.items()),
        encode.keywords["template"].hash, tokenizer_hash(encode.keywords["tokenizer"]), _CODE_HASH,
    )  # fmt: skip
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "rto_fast"
    path = folder / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.arrow"
    try:
        return TokenRows.of(argument, name, datasets.Dataset.from_file(str(path)).data.table)
    except (OSError, pa.ArrowException):
        pass  # not there, or damaged: tokenised again
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=folder, prefix=".part-")
    except OSError as e:
        raise DataError(
            f"data_cache: cannot write to {str(folder)!r} ({e}); set HF_DATASETS_CACHE to a folder of yours, "
            "or turn data_cache off"
        ) from e
    with made as scratch:
        table = _tokenise(config, read, encode, columns, scratch)
        part = os.path.join(scratch, "all.arrow")
        with pa.OSFile(part, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        os.replace(part, path)  # atomic: a reader finds the whole file or none
        return TokenRows.of(argument, name, table)


def _cores() -> int:
    """Processors of this process, at most MAX_WORKERS."""
    from rto_fast.distributed import cores  # which imports DeepSpeed

    return min(MAX_WORKERS, cores())


def _tokenise(
    config: RunConfig, read: Callable[[int], Table], encode: Encode, columns: Columns, scratch: str
) -> pa.Table:
    """All rows as _FEATURES; the table is a memory map of files in `scratch`.

    Shows a progress bar or, where bars are off, one line.
    """
    table = read(config.max_rows)
    rows = len(table.rows)
    workers = min(config.data_workers or (_cores() if rows >= PARALLEL_ROWS else 1), rows)
    if datasets.are_progress_bars_disabled():
        print(f"tokenising {Path(table.name).name}: {rows:,} rows", file=sys.stderr, flush=True)
    mapped = table.rows.map(
        _encode_row,
        fn_kwargs={"encode": encode, "keys": columns(table), "as_text": table.as_text, "literal": table.literal},
        remove_columns=table.rows.column_names,
        features=_FEATURES,
        num_proc=workers if workers > 1 else None,
        cache_file_name=os.path.join(scratch, "rows.arrow"),
        load_from_cache_file=False,
        new_fingerprint="rto_fast",
        desc=f"Tokenising {Path(table.name).name}",
    )
    return mapped.data.table


def _encode_row(row: dict[str, Any], encode: Encode, keys: list[str], as_text: bool, literal: bool) -> dict[str, Any]:
    """One row of _FEATURES; a row that cannot be used has its reason and no tokens."""
    line = row["line"] if as_text else 0
    reason = detail = ""
    try:
        out = encode(row_of(row, as_text, literal), keys)
    except BadRow as e:
        reason, detail = e.reason, e.detail
    except jinja2.TemplateError as e:
        reason, detail = REFUSED, f"the chat template refuses the conversation: {e}"
    except RecursionError:
        reason, detail = NOT_TEXT, TOO_DEEP
    if reason:
        out = {"prompt_ids": [], "first_ids": [], "second_ids": [], "text": "", "prompt": "", "margin": 0.0}
    return out | {"reason": reason, "detail": detail, "line": line}


_CODE_HASH = hashlib.sha256(
    b"".join(Path(f).read_bytes() for f in (__file__, row_formats.__file__, chat_template.__file__))
    + transformers.__version__.encode()
).hexdigest()
"""A cache that older code wrote is not used."""
