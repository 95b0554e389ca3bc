"""Columns of the prompts' rows, from every kind of file."""

from __future__ import annotations

import csv
import json

import datasets
import pytest

from rto_fast.config import RTOConfig
from rto_fast.data.columns import DataColumns
from rto_fast.errors import DataError

ROWS = [{"prompt": f"p{i}", "answer": f"#### {i}", "level": i} for i in range(6)]


def written(folder, kind):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        with path.open("w", newline="") as f:
            writer = csv.DictWriter(f, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder"])
def test_wanted_columns_of_rows_in_any_order(tmp_path, kind):
    columns = DataColumns.of_prompts(RTOConfig(data=written(tmp_path, kind)))
    assert columns.names == ["prompt", "answer", "level"]
    assert columns.of([1, 2]) == {}
    columns.want(["level", "answer"])
    columns.want(["answer"])
    numbers = [4, 0, 4]
    levels = list(map(str, numbers)) if kind == "csv" else numbers  # a CSV file knows text alone
    assert columns.of(numbers) == {"level": levels, "answer": [f"#### {i}" for i in numbers]}
    assert columns.of([]) == {"level": [], "answer": []}


def test_a_row_that_lacks_a_column(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": [1]}\n{"prompt": "b"}\n')
    columns = DataColumns.of_prompts(RTOConfig(data=str(tmp_path / "rows.jsonl")))
    columns.want(["answer"])
    assert columns.of([1, 0]) == {"answer": [None, [1]]}


def test_nothing_is_opened_before_somebody_asks(tmp_path):
    columns = DataColumns.of_prompts(RTOConfig(data=str(tmp_path / "gone.jsonl")))
    assert columns.of([0, 1]) == {}
    with pytest.raises(DataError, match="no file or folder"):
        columns.names  # noqa: B018
