"""The type check's count may only fall, and what stages hand to one another stays clean."""

from __future__ import annotations

import json
import runpy

import pytest
from loop_helpers import ROOT

TOOL = runpy.run_path(str(ROOT / "tools" / "type_check.py"), run_name="tool")


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ({"a.py": 2}, []),
        ({"a.py": 1}, []),
        ({"a.py": 3}, ["a.py: 3 errors, 2 allowed"]),
        ({"a.py": 2, "b.py": 1}, ["b.py: 1 errors, 0 allowed"]),
    ],
)
def test_more_errors_than_allowed_are_named(found, wrong):
    assert TOOL["verdict"](found, {"a.py": 2}) == wrong


def test_an_update_lowers_and_never_raises():
    assert TOOL["lowered"]({"a.py": 1, "b.py": 5, "d.py": 1}, {"a.py": 2, "b.py": 3, "c.py": 4}) == {
        "a.py": 1,
        "b.py": 3,
    }


def test_what_must_be_clean_cannot_be_listed():
    (line,) = TOOL["verdict"]({}, {"rto_fast/algo/losses.py": 1})
    assert "must be clean" in line


def test_the_list_names_files_that_are_there():
    allowed = json.loads((ROOT / "tools" / "type_errors.json").read_text())
    assert all((ROOT / file).exists() and n > 0 for file, n in allowed.items())
    assert TOOL["verdict"]({}, allowed) == []
