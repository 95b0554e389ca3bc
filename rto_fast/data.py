"""Prompts, preference pairs and SFT rows -> token ids.

`load_prompts`, `load_preferences` and `load_sft` read a Hub data set, a local .jsonl/.json/.parquet/.csv
file or a folder saved by `datasets.save_to_disk` (sources.py), bring every known row format to prompt and
response (rows.py) and encode them with the run's template (template.py). A row's number is its 0-based index
in the data set; messages about JSON lines and CSV files name the 1-based line instead.

Tokenised rows are kept in `<HF_DATASETS_CACHE>/rto_fast`, an Arrow file for each combination of data,
tokenizer, template, keys and row limit. Length limits apply after the cache: a new one tokenises nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import pyarrow as pa
import torch.distributed as dist
import transformers
from transformers import PreTrainedTokenizerBase

from rto_fast import rows as row_formats
from rto_fast import template as templates
from rto_fast.config import DPOConfig, PreferenceConfig, RTOConfig, RunConfig, SFTConfig, SupervisedConfig
from rto_fast.errors import DataError
from rto_fast.rows import (
    REFUSED,
    BadRow,
    answer_columns,
    answer_row,
    preference_columns,
    preference_row,
    prompt_columns,
    prompt_row,
    sft_columns,
    sft_row,
)
from rto_fast.sources import Table, has_splits, open_source
from rto_fast.template import ChatTemplate, Message, Prompt, as_messages, check_template, load_template, save_template
from rto_fast.tokenizer import check_max_length, check_vocabulary, load_tokenizer, stop_token_ids, tokenizer_hash

__all__ = [
    "ChatTemplate", "Counts", "DataError", "PreferenceData", "PromptData", "SFTData", "TokenLists",
    "check_max_length", "check_template", "check_vocabulary", "load_answers", "load_preferences", "load_prompts",
    "load_sft", "load_template", "load_tokenizer", "save_template", "stop_token_ids", "tokenizer_hash",
]  # fmt: skip

PARALLEL_ROWS = 10_000
"""Rows from which starting worker processes pays."""
MAX_WORKERS = 16

TOO_LONG = "longer than the limit"
PROMPT_TOO_LONG = "prompt alone longer than the limit"
SAME_CUT = "chosen = rejected once cut"


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


@dataclass(frozen=True)
class Counts:
    """What became of the rows of one data set (before a held-out share is split off)."""

    total: int
    kept: int
    skipped: dict[str, int]
    """Rows left out, by reason."""
    truncated: int = 0
    """Kept rows whose response was cut to the length limit."""

    def __str__(self) -> str:
        text = f"{self.total:,} rows, {self.kept:,} kept"
        if self.truncated:
            text += f" ({self.truncated:,} of them cut to the limit)"
        if self.skipped:
            reasons = ", ".join(f"{reason}: {n:,}" for reason, n in self.skipped.items())
            text += f", {self.total - self.kept:,} skipped ({reasons})"
        return text


@dataclass(frozen=True)
class PromptData:
    """Prompts to sample from."""

    prompt_ids: Sequence[list[int]]
    texts: list[str]
    """The prompts as rendered: what reward functions and remote reward models see."""
    messages: list[list[Message]]
    """The prompts as messages (a string prompt is one user message)."""
    rows: list[int]
    """0-based rows of the data set."""
    counts: Counts
    prompts: list[Prompt]
    """The prompts as the data has them (string or messages), for encoding with another model's template."""

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class PreferenceData:
    """Pairs of responses to one prompt."""

    prompt_ids: Sequence[list[int]]
    chosen_ids: Sequence[list[int]]
    """Response ids with the end of turn, unless cut."""
    rejected_ids: Sequence[list[int]]
    rows: list[int]
    """0-based rows of the data set."""
    counts: Counts

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class SFTData:
    """Prompts with the response to learn."""

    prompt_ids: Sequence[list[int]]
    response_ids: Sequence[list[int]]
    """Response ids with the end of turn, unless cut."""
    rows: list[int]
    """0-based rows of the data set."""
    counts: Counts

    def __len__(self) -> int:
        return len(self.rows)


def load_prompts(config: RTOConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> PromptData:
    """Prompts of `config.data`, at most `config.max_prompt_length` tokens each.

    With prompt_key "auto" a string prompt beside a `chosen` conversation is read from that conversation, as
    `load_preferences` does, so that all stages see one prompt. A prompt is never cut: over the limit it is
    skipped under overlong "truncate" too. Prints the counts; raises DataError.
    """
    encode = partial(prompt_row, tokenizer=tokenizer, template=template)
    columns = partial(prompt_columns, prompt=config.prompt_key)
    rows = _load(config, "data", config.data, encode, columns)
    kept, counts, _ = _judge(config, rows, config.max_prompt_length, "max_prompt_length")
    prompts = [json.loads(rows.prompts[i]) for i in kept]
    return PromptData(
        prompt_ids=rows.prompt_ids.take(kept),
        texts=[rows.texts[i] for i in kept],
        messages=[as_messages(p) for p in prompts],
        rows=kept.tolist(),
        counts=counts,
        prompts=prompts,
    )


def load_preferences(
    config: PreferenceConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> tuple[PreferenceData, PreferenceData]:
    """(training pairs, held-out pairs), at most `config.max_length` tokens of prompt + longer response.

    Where chosen and rejected are whole conversations, their earlier turns are the prompt and must be the same
    in both. Held out are the rows of `config.eval_data` (or of `config.eval_split`, where `data` has splits), else a
    share `config.eval_fraction` chosen by the seed, whole prompts at a time, so that no held-out prompt is trained on.
    Prints the counts. Raises DataError.
    """
    keys = {"prompt": config.prompt_key, "chosen": config.chosen_key, "rejected": config.rejected_key}
    encode = partial(preference_row, tokenizer=tokenizer, template=template)
    return tuple(
        PreferenceData(p.prompt_ids, p.first_ids, p.second_ids, p.rows, p.counts)
        for p in _train_and_held_out(config, encode, partial(preference_columns, **keys))
    )


def load_answers(
    config: DPOConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> tuple[PreferenceData, PreferenceData]:
    """As `load_preferences`, from pairs or from labelled rows {prompt, completion, label}.

    A labelled row is a pair whose other response is empty: `rejected_ids` where it is desirable, else `chosen_ids`.
    """
    keys = {"prompt": config.prompt_key, "chosen": config.chosen_key, "rejected": config.rejected_key}
    keys |= {"completion": config.completion_key, "label": config.label_key}
    encode = partial(answer_row, tokenizer=tokenizer, template=template)
    return tuple(
        PreferenceData(p.prompt_ids, p.first_ids, p.second_ids, p.rows, p.counts)
        for p in _train_and_held_out(config, encode, partial(answer_columns, **keys))
    )


def load_sft(config: SFTConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> tuple[SFTData, SFTData]:
    """(training rows, held-out rows), at most `config.max_length` tokens of prompt + response.

    Of a `messages` list the last turn, the assistant's, is the response and all earlier ones are the prompt.
    Held out as in `load_preferences`. Prints the counts; raises DataError.
    """
    encode = partial(sft_row, tokenizer=tokenizer, template=template)
    columns = partial(sft_columns, prompt=config.prompt_key, response=config.response_key)
    return tuple(
        SFTData(p.prompt_ids, p.first_ids, p.rows, p.counts) for p in _train_and_held_out(config, encode, columns)
    )


Encode = Callable[[dict[str, Any], list[str]], dict[str, Any]]
"""(row, its keys) -> the fields of rows.encoded; raises BadRow."""
Columns = Callable[[Table], list[str]]
"""The keys that an encoder reads, of a table; raises DataError."""


@dataclass(frozen=True)
class _Part:
    prompt_ids: TokenLists
    first_ids: TokenLists
    second_ids: TokenLists
    rows: list[int]
    counts: Counts

    def take(self, index: np.ndarray) -> _Part:
        ids = (ids.take(index) for ids in (self.prompt_ids, self.first_ids, self.second_ids))
        return _Part(*ids, rows=[self.rows[i] for i in index], counts=self.counts)


def _train_and_held_out(config: SupervisedConfig, encode: Encode, columns: Columns) -> tuple[_Part, _Part]:
    def part(argument: str, name: str) -> _Part:
        rows = _load(config, argument, name, encode, columns)
        kept, counts, limits = _judge(config, rows, config.max_length, "max_length")
        first, second = (ids.take(kept).cut(limits) for ids in (rows.first_ids, rows.second_ids))
        return _Part(rows.prompt_ids.take(kept), first, second, kept.tolist(), counts)

    train = part("data", config.data)
    if config.eval_data or (config.eval_split and has_splits(config.data)):
        return train, part("eval_data", config.eval_data or config.data)
    held_out = _held_out(train.prompt_ids, config.eval_fraction, config.seed)
    return train.take(np.flatnonzero(~held_out)), train.take(np.flatnonzero(held_out))


def _held_out(prompts: TokenLists, fraction: float, seed: int) -> np.ndarray:
    """[rows] bool: about `fraction` of the rows, all rows of a prompt together, in order of seeded hashes.

    At least one row when fraction > 0 and there are two; rows go singly where every prompt has too many.
    """
    n = len(prompts)
    wanted = min(n - 1, max(1, round(fraction * n))) if fraction > 0 else 0
    order: dict[bytes, list[int]] = {}
    for row, ids in enumerate(prompts):
        order.setdefault(hashlib.sha256(f"{seed}:{ids}".encode()).digest(), []).append(row)
    groups = [order[k] for k in sorted(order)]
    if not any(len(g) <= wanted for g in groups):
        groups = [[row] for g in groups for row in g]
    held_out = np.zeros(n, dtype=bool)
    for group in groups:
        if len(group) <= wanted:
            held_out[group] = True
            wanted -= len(group)
    return held_out


def _judge(config: RunConfig, rows: _Rows, limit: int, limit_name: str) -> tuple[np.ndarray, Counts, np.ndarray]:
    """(kept rows, counts, the kept rows' response limits in tokens).

    Raises DataError where a flag says refuse and where no row is left; prints the counts on rank 0.
    """
    reasons = rows.reasons.copy()
    bad = [i for i, reason in enumerate(reasons) if reason]
    if bad and config.invalid_rows == "refuse":
        raise DataError(
            f"{rows.at(bad[0])}: {rows.details[bad[0]]} ({reasons[bad[0]]}; the first of {len(bad):,} "
            f"unusable rows in {len(reasons):,}); mend the data, or pass --invalid-rows skip"
        )
    prompt = rows.prompt_ids.lengths
    lengths = prompt + np.maximum(rows.first_ids.lengths, rows.second_ids.lengths)
    over = np.flatnonzero(lengths > limit).tolist()
    responses = bool(rows.first_ids.lengths.any() or rows.second_ids.lengths.any())
    if over and config.overlong == "refuse":
        raise DataError(
            f"{rows.at(over[0])}: {lengths[over[0]]} tokens, over {limit_name} {limit} (the first of "
            f"{len(over):,} such rows in {len(reasons):,}, the longest has {lengths.max()}); raise "
            f"--{limit_name.replace('_', '-')}, or pass --overlong skip{' or truncate' if responses else ''}"
        )
    truncated = 0
    for i in over:
        room = limit - prompt[i]
        if config.overlong != "truncate" or not responses:
            reasons[i] = TOO_LONG
        elif room < 1:
            reasons[i] = PROMPT_TOO_LONG
        elif rows.first_ids[i][:room] == rows.second_ids[i][:room]:
            reasons[i] = SAME_CUT
        else:
            truncated += 1
    kept = np.array([i for i, reason in enumerate(reasons) if not reason], dtype=np.int64)
    skipped = dict(sorted(Counter(r for r in reasons if r).items()))
    counts = Counts(total=len(reasons), kept=len(kept), skipped=skipped, truncated=truncated)
    if not len(kept):
        raise DataError(f"{rows.argument}: no usable row in {rows.name!r}: {counts}; {limit_name} is {limit}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{rows.argument} {rows.name}: {counts}", flush=True)
    return kept, counts, limit - prompt[kept]


@dataclass(frozen=True)
class _Rows:
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

    @classmethod
    def of(cls, argument: str, name: str, table: pa.Table) -> _Rows:
        def tokens(column: str) -> TokenLists:
            chunks = table.column(column).chunks
            lengths = np.concatenate([np.asarray(c.value_lengths()) for c in chunks]).astype(np.int64)
            ends = np.cumsum(lengths)
            return TokenLists(np.concatenate([np.asarray(c.flatten()) for c in chunks]), ends - lengths, ends)

        ids = [tokens(c) for c in ("prompt_ids", "first_ids", "second_ids")]
        return cls(argument, name, *ids, *(table.column(c).to_pylist() for c in _PLAIN_COLUMNS))

    def at(self, row: int) -> str:
        line = self.lines[row]
        return f"{self.argument}: {self.name!r}, " + (f"line {line}" if line else f"row {row} (from 0)")


_PLAIN_COLUMNS = ("text", "prompt", "reason", "detail", "line")
_FEATURES = datasets.Features(
    {k: datasets.List(datasets.Value("int32")) for k in ("prompt_ids", "first_ids", "second_ids")}
    | {k: datasets.Value("string") for k in _PLAIN_COLUMNS[:-1]}
    | {"line": datasets.Value("int64")}
)


def _load(config: RunConfig, argument: str, name: str, encode: Encode, columns: Columns) -> _Rows:
    """Tokenises a data set, or takes its rows from the cache.

    With several ranks the first of each machine goes ahead and the others read what it wrote; an error of one
    is raised by all.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return _load_here(config, argument, name, encode, columns)
    rows, error = None, None
    if int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0:
        try:
            rows = _load_here(config, argument, name, encode, columns)
        except Exception as e:  # the other ranks wait: they must hear of any failure
            error = e
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error and (str(error) or repr(error)))
    if error:
        raise error
    if any(errors):
        raise DataError(next(e for e in errors if e))
    return rows or _load_here(config, argument, name, encode, columns)


def _load_here(config: RunConfig, argument: str, name: str, encode: Encode, columns: Columns) -> _Rows:
    split = getattr(config, "eval_split", "") if argument == "eval_data" else ""
    fingerprint, read = open_source(argument, name, split or config.data_split)
    if not config.data_cache:
        with tempfile.TemporaryDirectory() as scratch:
            return _Rows.of(argument, name, _tokenise(config, read, encode, columns, scratch))
    identity = (
        fingerprint, config.max_rows, columns.func.__name__, sorted(columns.keywords.items()),
        encode.keywords["template"].hash, tokenizer_hash(encode.keywords["tokenizer"]), _CODE_HASH,
    )  # fmt: skip
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "rto_fast"
    path = folder / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.arrow"
    try:
        return _Rows.of(argument, name, datasets.Dataset.from_file(str(path)).data.table)
    except (OSError, pa.ArrowException):
        pass  # not there, or damaged: made anew
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".part-")
    except OSError as e:
        raise DataError(
            f"data_cache: cannot write to {str(folder)!r} ({e}); set HF_DATASETS_CACHE to a folder of yours, "
            "or turn data_cache off"
        ) from e
    with scratch:
        table = _tokenise(config, read, encode, columns, scratch.name)
        part = os.path.join(scratch.name, "all.arrow")
        with pa.OSFile(part, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        os.replace(part, path)  # atomic: a reader finds the whole file or none
        return _Rows.of(argument, name, table)


def _tokenise(
    config: RunConfig, read: Callable[[int], Table], encode: Encode, columns: Columns, scratch: str
) -> pa.Table:
    """All rows as _FEATURES, with a progress bar; the table is a memory map of files in `scratch`."""
    table = read(config.max_rows)
    rows = len(table.rows)
    cores = min(MAX_WORKERS, len(os.sched_getaffinity(0))) if rows >= PARALLEL_ROWS else 1
    workers = min(config.data_workers or cores, rows)
    mapped = table.rows.map(
        _encode_row,
        fn_kwargs={"encode": encode, "keys": columns(table), "as_text": table.as_text},
        remove_columns=table.rows.column_names,
        features=_FEATURES,
        num_proc=workers if workers > 1 else None,
        cache_file_name=os.path.join(scratch, "rows.arrow"),
        load_from_cache_file=False,
        new_fingerprint="rto_fast",
        desc=f"Tokenising {Path(table.name).name}",
    )
    return mapped.data.table


def _encode_row(row: dict[str, Any], encode: Encode, keys: list[str], as_text: bool) -> dict[str, Any]:
    """One row of _FEATURES; a row that cannot be used has its reason and no tokens."""
    line = row["line"] if as_text else 0
    reason = detail = ""
    try:
        out = encode(json.loads(row["json"]) if as_text else row, keys)
    except BadRow as e:
        reason, detail = e.reason, e.detail
    except jinja2.TemplateError as e:
        reason, detail = REFUSED, f"the chat template refuses the conversation: {e}"
    if reason:
        out = {"prompt_ids": [], "first_ids": [], "second_ids": [], "text": "", "prompt": ""}
    return out | {"reason": reason, "detail": detail, "line": line}


_CODE_HASH = hashlib.sha256(
    b"".join(Path(f).read_bytes() for f in (__file__, row_formats.__file__, templates.__file__))
    + transformers.__version__.encode()
).hexdigest()
"""A cache that older code wrote is not used."""
