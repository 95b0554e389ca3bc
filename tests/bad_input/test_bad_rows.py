"""Rows and files of data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from loop_helpers import write_rows
from refusal_helpers import GOOD

pytestmark = pytest.mark.usefixtures("one_rank")

HALF = GOOD | {"prompt": "Once \ud83e there was a fox."}
"""JSON can spell half a character; no tokenizer takes it."""
BAD_ROWS = {
    "missing key": ({"prompt": "A fox.", "chosen": "It ran."}, r"'rejected' is missing \(missing key"),
    "not text": (GOOD | {"chosen": 7}, r"'chosen' is int where text was expected: '7' \(not text"),
    "empty text": (GOOD | {"rejected": "  "}, r"'rejected' is empty \(empty text"),
    "chosen = rejected": (
        GOOD | {"rejected": GOOD["chosen"]},
        r"'chosen' and 'rejected' are the same \(chosen = rejected",
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_row(kind, refused, tmp_path):
    row, message = BAD_ROWS[kind]
    path = write_rows(tmp_path / "pairs.jsonl", [GOOD, GOOD, row, row])
    for recipe in ("rm_llama3.py", "dpo_llama3.py"):
        refused(recipe, rf"data: '{path}', line 3: {message}; the first of 2 .* in 4\); mend the data, or pass "
                        r"--invalid-rows skip", data=path, invalid_rows="refuse")  # fmt: skip


def test_recipes_skip_what_the_default_data_hold(run, refused, tmp_path):
    """Rows of empty text or with chosen = rejected, counted; other bad rows are refused still."""
    rows = [GOOD, BAD_ROWS["empty text"][0], BAD_ROWS["chosen = rejected"][0], *[GOOD] * 3]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    row, message = BAD_ROWS["not text"]
    other = write_rows(tmp_path / "other.jsonl", [*rows, row])
    for recipe in ("rm_llama3.py", "dpo_llama3.py"):
        refused(recipe, rf"data: '{other}', line 7: {message}; the first of 1 unusable rows in 7\)", data=other)
    texts = write_rows(tmp_path / "texts.jsonl", [{"prompt": "A fox.", "response": ""}] * 2)
    refused("sft_llama3.py", r"data: no usable row in .*empty text: 2", data=texts)
    refused(
        "rto_llama3.py", r"line 2: 'prompt' is empty", data=write_rows(tmp_path / "p.jsonl", [GOOD, {"prompt": ""}])
    )
    code, stdout, _ = run("rm_llama3.py", data=path, eval_fraction=0)
    assert code == 0
    assert f"data {path}: 6 rows, 4 kept, 2 skipped (chosen = rejected: 1, empty text: 1)\n" in stdout


def test_half_a_character(refused, tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [GOOD, HALF])
    refused("rm_llama3.py", rf"data: '{path}', line 2: 'prompt' holds '\\ud83e' at character 5", data=path)


def test_files_that_cannot_be_read(refused, tmp_path, tiny, monkeypatch):
    binary = tmp_path / "binary.jinja"
    binary.write_bytes(b"\xff\xfe{{ messages }}")
    refused("rm_llama3.py", r"chat_template: .*binary.jinja' is no readable UTF-8 text", chat_template=binary)
    real = Path.open

    def locked(path, *rest, **options):
        if str(path) == tiny.pairs:
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **options)

    monkeypatch.setattr(Path, "open", locked)  # root reads everything, so that modes would not do
    refused("rm_llama3.py", rf"data: '{tiny.pairs}' cannot be read: Permission denied")


def test_bad_prompt_and_response(refused, tmp_path):
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "A fox."}, {"prompt": ""}])
    refused("rto_llama3.py", rf"data: '{path}', line 2: 'prompt' is empty", data=path)
    path = write_rows(tmp_path / "texts.jsonl", [{"prompt": "A fox.", "response": "It ran."}, {"prompt": "A cat."}])
    refused("sft_llama3.py", rf"data: '{path}', line 2: 'response' is missing", data=path)
    refused("rto_llama3.py", r"data: .* has no column 'promt'; .*did you mean --prompt-key prompt\?",
            data=path, prompt_key="promt")  # fmt: skip


def test_bad_rows_skipped_and_counted(run, tmp_path):
    rows = [GOOD, *(row for row, _ in BAD_ROWS.values()), GOOD | {"chosen": "It ran. " * 40}, *[GOOD] * 3]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    code, stdout, _ = run("rm_llama3.py", data=path, invalid_rows="skip", eval_fraction=0)
    assert code == 0
    assert (
        f"data {path}: 9 rows, 4 kept, 5 skipped (chosen = rejected: 1, empty text: 1, longer than the limit: 1, "
        "missing key: 1, not text: 1)\n"
    ) in stdout
    assert "warning: no pair is held out" in stdout
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert (config["mean"], config["std"]) == (0, 1)


def test_row_over_the_limit(refused, tiny, tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [GOOD, GOOD | {"chosen": "It ran. " * 40}])
    refused("rm_llama3.py", rf"data: '{path}', line 2: \d+ tokens, over max_length 64 \(the first of 1 .*--max-length, "
            "or pass --overlong skip or truncate", data=path, overlong="refuse")  # fmt: skip
    refused("dpo_llama3.py", r"data: no usable row in .*longer than the limit: 2", data=path, max_length=4)
    refused("rto_llama3.py", r"data: .* over max_prompt_length 2 ", max_prompt_length=2, overlong="refuse")


def test_file_that_is_missing_or_malformed(refused, tiny, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(GOOD) + "\n{not json\n")
    for recipe in ("rm_llama3.py", "rto_llama3.py", "sft_llama3.py"):
        near = re.escape(str(tmp_path / "pairs.jsonl"))
        refused(
            recipe, rf"data: no file or folder '.*pears.jsonl'; did you mean '{near}'\?", data=tmp_path / "pears.jsonl"
        )
        refused(recipe, r"data: '.*pairs.jsonl', line 2, column 2: malformed JSON", data=tmp_path / "pairs.jsonl")
    for name, text, message in (
        ("empty.jsonl", "", "is empty"),
        ("rows.txt", "a", "has unknown file type '.txt'; expected .jsonl"),
        ("list.jsonl", "[1, 2]\n", "line 1: expected an object of columns, found a JSON list"),
        ("pairs.csv", 'prompt,chosen\na,b,c\n', "line 2: 3 fields where the header has 2"),
        ("pairs.parquet", "no parquet", "is no readable Parquet file"),
        ("bytes.jsonl", "\udcff", "line 1: not UTF-8"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
        refused("rm_llama3.py", rf"data: .*{re.escape(name)}.*{re.escape(message)}", data=tmp_path / name)
    refused("rm_llama3.py", r"eval_data: no file or folder", eval_data=tmp_path / "held_out.jsonl")
