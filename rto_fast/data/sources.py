"""Read rows from the Hub, local files and folders saved by `datasets`.

Errors name the file and the line.

JSON, JSON lines and CSV are read here line by line, so that a message can name the line and a column may hold
text in one row and messages in the next. Parquet, saved folders and the Hub go through `datasets`. Of a data set with
several configurations one is named behind a colon, as in `openai/gsm8k:main`.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from rto_fast.data.chat_template import near_names
from rto_fast.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
TOO_DEEP = "lists or objects nested too deeply"


@dataclass(frozen=True)
class Table:
    """An opened data set with at least one row."""

    argument: str
    """Setting that names it."""
    name: str
    """As the user gave it."""
    rows: datasets.Dataset
    """The rows; under `as_text` in two columns, `json` (the whole row) and `line` (1-based; 0 = unknown)."""
    columns: list[str]
    as_text: bool
    literal: bool
    """Whether text is text: in JSON, which has lists of its own, and not in CSV and columns with a type."""

    def need(self, *keys: str, flag: str) -> str:
        """The first of `keys` that is a column; raises DataError with the columns there are."""
        found = next((k for k in keys if k in self.columns), None)
        if found is None:
            near = difflib.get_close_matches(keys[0], self.columns, n=1, cutoff=0.5)
            raise DataError(
                f"{self.argument}: {self.name!r} has no column {' or '.join(map(repr, keys))}; it has "
                f"{', '.join(map(repr, self.columns))}"
                + (f"; did you mean --{flag} {near[0]}?" if near else f"; name the column by --{flag}")
            )
        return found


def open_source(argument: str, name: str, split: str) -> tuple[str, Callable[[int], Table]]:
    """(fingerprint of the content, reader of the first n rows where 0 = all).

    A file is hashed here and parsed by the reader alone. `split` is that of a Hub data set or saved folder.
    Both raise DataError.
    """
    place, config = _parts(name)
    path = Path(place).expanduser()
    try:
        is_file = path.is_file()
        if is_file:
            path.open("rb").close()
    except OSError as e:
        raise DataError(f"{argument}: {name!r} cannot be read: {e.strerror}") from e
    if is_file:
        if config:
            raise DataError(f"{argument}: {place!r} is a file, which has no configuration {config!r}")
        if path.suffix.lower() not in SUFFIXES:
            expected = ", ".join(SUFFIXES)
            raise DataError(f"{argument}: {name!r} has unknown file type {path.suffix!r}; expected {expected}")
        if not path.stat().st_size:
            raise DataError(f"{argument}: {name!r} is empty")
        with path.open("rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest() + path.suffix.lower()
        return digest, lambda max_rows: _read_file(argument, name, path, max_rows)
    local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if _is_repository(path):
        data = _repository(argument, name, str(path), config, split)
    elif path.is_dir():
        if config:
            raise DataError(f"{argument}: folder {place!r} has no README.md that names configurations like {config!r}")
        data = _saved_folder(argument, name, path, split)
    elif local or path.suffix.lower() in SUFFIXES:
        raise DataError(f"{argument}: no file or folder {name!r}{near_names(path)}")
    else:
        data = _repository(argument, name, place, config, split)
    return data._fingerprint, lambda max_rows: _typed(argument, name, data, max_rows)


def has_splits(name: str) -> bool:
    """Whether a split can be chosen: of a Hub data set or a saved dictionary of them; a file has none."""
    path = Path(_parts(name)[0]).expanduser()
    saved = (path / datasets.config.DATASETDICT_JSON_FILENAME).exists()
    return saved or _is_repository(path) or not path.exists()


def _parts(name: str) -> tuple[str, str]:
    """(the data set, the configuration behind its last colon or "")."""
    place, _, config = name.rpartition(":")
    one = bool(place) and bool(config) and "/" not in config and not Path(name).expanduser().exists()
    return (place, config) if one else (name, "")


def _is_repository(path: Path) -> bool:
    """Whether a folder is a copy of a data set's repository, which its README.md describes."""
    saved = (datasets.config.DATASETDICT_JSON_FILENAME, datasets.config.DATASET_STATE_JSON_FILENAME)
    return (path / "README.md").is_file() and not any((path / name).exists() for name in saved)


def _repository(argument: str, name: str, place: str, config: str, split: str) -> datasets.Dataset:
    """A split of a data set on the Hub, or in a copy of its repository; name: as the user gave it."""
    settings = {"name": config} if config else {}
    try:
        return datasets.load_dataset(place, split=split, **settings)
    except Exception as e:  # datasets and huggingface_hub raise many unrelated types here
        there = _configurations(place) if isinstance(e, ValueError) else []
        if config not in there and (config or len(there) > 1):
            why = f"has no configuration {config!r}" if config else "has several configurations"
            choices = f"it has {', '.join(there)}; name one as {place}:{there[0]}" if there else _one_line(e)
            raise DataError(f"{argument}: {place!r} {why}: {choices}") from e
        path = Path(place)
        where = "" if path.exists() else f"is no local file or folder{near_names(path)}, and the Hub "
        raise DataError(
            f"{argument}: {name!r} {where}gave no data set of this name with split {split!r}: {_one_line(e)}"
        ) from e


def _configurations(place: str) -> list[str]:
    """Those of a repository; empty where they cannot be read."""
    try:
        return datasets.get_dataset_config_names(place)
    except Exception:  # as above: what went wrong first is the message
        return []


def _saved_folder(argument: str, name: str, path: Path, split: str) -> datasets.Dataset:
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as e:  # a folder of anything else fails in many ways
        files = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix.lower() in SUFFIXES)) or "none"
        raise DataError(
            f"{argument}: folder {name!r} was not saved by datasets.save_to_disk ({_one_line(e)}); "
            f"data files in it that can be given by their path: {files}"
        ) from e
    if not isinstance(data, datasets.DatasetDict):
        return data
    if split not in data:
        raise DataError(f"{argument}: {name!r} has no split {split!r}; it has {', '.join(data)}; see --data-split")
    return data[split]


def _typed(argument: str, name: str, data: datasets.Dataset, max_rows: int) -> Table:
    if not len(data):
        raise DataError(f"{argument}: {name!r} has no rows")
    if max_rows:
        data = data.select(range(min(max_rows, len(data))))
    return Table(argument, name, data, data.column_names, as_text=False, literal=False)


def _read_file(argument: str, name: str, path: Path, max_rows: int) -> Table:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        try:
            data = datasets.load_dataset("parquet", data_files=str(path), split="train")
        except Exception as e:  # datasets wraps Arrow's errors
            cause = _one_line(e.__cause__ or e)
            raise DataError(f"{argument}: {name!r} is no readable Parquet file: {cause}") from e
        return _typed(argument, name, data, max_rows)
    rows: list[str] = []
    lines: list[int] = []
    columns: dict[str, None] = {}
    for line, row in (_csv_rows if suffix == ".csv" else _json_rows)(argument, name, path):
        if not isinstance(row, dict):
            at = f"line {line}" if line else f"row {len(rows)} (from 0)"
            kind = type(row).__name__
            raise DataError(f"{argument}: {name!r}, {at}: expected an object of columns, found a JSON {kind}")
        try:
            rows.append(json.dumps(row))
        except RecursionError as e:
            at = f"line {line}" if line else f"row {len(rows)} (from 0)"
            raise DataError(f"{argument}: {name!r}, {at}: {TOO_DEEP}; mend or delete it") from e
        lines.append(line)
        columns.update(dict.fromkeys(row))
        if len(rows) == max_rows:
            break
    if not rows:
        raise DataError(f"{argument}: {name!r} has no rows")
    features = datasets.Features(json=datasets.Value("large_string"), line=datasets.Value("int64"))
    data = datasets.Dataset.from_dict({"json": rows, "line": lines}, features)
    return Table(argument, name, data, list(columns), as_text=True, literal=suffix != ".csv")


class _Twice(dict):
    """A JSON object with a key that comes twice, of which only the last value is kept."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    return row if len(row) == len(pairs) else _Twice({"": Counter(k for k, _ in pairs).most_common(1)[0][0]})


def _twice(value: Any) -> str | None:
    """The key that comes twice in an object of `value`, at any depth."""
    rest = [value]
    while rest:  # no recursion: lists nest deeper than Python's calls
        value = rest.pop()
        if isinstance(value, _Twice):
            return value[""]
        rest += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return None


def _json_rows(argument: str, name: str, path: Path) -> Iterator[tuple[int, Any]]:
    """(line, row) of JSON lines; (0, row) of a .json file that is one list."""

    def parse(text: bytes, line: int) -> Any:
        try:
            return json.loads(text.decode("utf-8-sig" if line == 1 else "utf-8"), object_pairs_hook=_object)
        except UnicodeDecodeError as e:
            where = f"line {line + text[: e.start].count(10)}"
            raise DataError(f"{argument}: {name!r}, {where}: not UTF-8 ({e.reason}); mend or delete it") from e
        except json.JSONDecodeError as e:
            where = f"line {line + e.lineno - 1}, column {e.colno}"
            hint = _over_lines(path) if line == 1 else ""
            raise DataError(
                f"{argument}: {name!r}, {where}: {hint or f'malformed JSON: {e.msg}; mend or delete it'}"
            ) from e
        except (ValueError, RecursionError) as e:
            why = "a number of too many digits" if isinstance(e, ValueError) else TOO_DEEP
            where = f"line {line}: " if text.count(b"\n") == 0 else ""
            raise DataError(f"{argument}: {name!r}, {where}{why}; mend or delete it") from e

    def checked(row: Any, at: str) -> Any:
        key = _twice(row)
        if key is not None:
            raise DataError(f"{argument}: {name!r}, {at}: key {key!r} comes twice in an object; rename or delete one")
        return row

    with path.open("rb") as f:
        start = f.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        if path.suffix.lower() == ".json" and start.startswith(b"["):
            for n, row in enumerate(parse(path.read_bytes(), 1)):
                yield 0, checked(row, f"row {n} (from 0)")
            return
        f.seek(0)
        for line, text in enumerate(f, start=1):
            if text.strip():
                yield line, checked(parse(text.rstrip(), line), f"line {line}")


def _over_lines(path: Path) -> str:
    """What is wrong with a file of JSON lines whose first value runs over several of them; "" for any other file."""
    try:
        with path.open(encoding="utf-8-sig") as f:
            text = f.read(2**26).lstrip()
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return ""
    if "\n" not in text[:end].strip():
        return ""
    if isinstance(value, list):
        return "a JSON list over several lines; name the file .json, or write one object a line"
    return "an object over several lines (pretty-printed); write one object a line (jq -c .), or a list in a .json file"


def _csv_rows(argument: str, name: str, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line that a row ends on, row) of a CSV file whose first row names the columns; every value is text."""
    csv.field_size_limit(2**31 - 1)
    with path.open(newline="", encoding="utf-8-sig") as f:
        reader = csv.reader(f, strict=True)
        try:
            header = next(reader, [])
            twice = next((column for column, n in Counter(header).items() if column and n > 1), None)
            if twice is not None:
                raise DataError(f"{argument}: {name!r}, line 1: column {twice!r} comes twice; rename or delete one")
            for values in reader:
                if values and len(values) != len(header):
                    raise DataError(
                        f"{argument}: {name!r}, line {reader.line_num}: {len(values)} fields where the "
                        f"header has {len(header)}; mend or delete it"
                    )
                if values:
                    yield reader.line_num, dict(zip(header, values, strict=True))
        except (csv.Error, UnicodeDecodeError) as e:
            raise DataError(f"{argument}: {name!r}, line {reader.line_num + 1}: malformed CSV: {e}") from e


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
