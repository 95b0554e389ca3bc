"""What is refused names the argument, the file and the place."""

from __future__ import annotations

import json

import datasets
import pytest
from data_helpers import GOOD, ROWS, Hub, as_conversations, bad_file, preferences, prompts, sft, turn, write_jsonl
from test_chat_template import REFUSING, byte_tokenizer

from rto_fast.data.chat_template import load_template
from rto_fast.data.load import Counts
from rto_fast.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", "", "d.jsonl' is empty"),
        ("d.jsonl", "\n \n", "d.jsonl' has no rows"),
        ("d.json", "[]", "d.json' has no rows"),
        ("d.csv", "prompt,chosen,rejected\n", "d.csv' has no rows"),
        ("d.jsonl", GOOD + "\n" + GOOD[:40] + "\n" + GOOD, "d.jsonl', line 3, column 36: malformed JSON"),
        ("d.jsonl", GOOD + GOOD[:-3], "d.jsonl', line 2, column .*: malformed JSON"),
        ("d.json", json.dumps(ROWS, indent=1)[:-9], "d.json', line .*, column .*: malformed JSON"),
        ("d.jsonl", GOOD.encode() * 2 + b'{"prompt": "\xff"}\n', "d.jsonl', line 3: not UTF-8"),
        ("d.jsonl", GOOD + "[1, 2]\n", "d.jsonl', line 2: expected an object of columns, found a JSON list"),
        ("d.json", '[{"prompt": "a"}, "b"]', "d.json', row 1 .*: expected an object of columns, found a JSON str"),
        ("d.csv", "prompt,chosen,rejected\na,b,c\na,b\n", "d.csv', line 3: 2 fields where the header has 3"),
        ("d.csv", 'prompt,chosen,rejected\na,b,"c\n', "d.csv', line .*: malformed CSV"),
        ("d.parquet", "PAR1 not really", "d.parquet' is no readable Parquet file"),
        ("d.txt", "text", r"d.txt' has unknown file type '.txt'; expected .jsonl, .json, .csv, .parquet"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, tokenizer, template, cache, name, content, message):
    """Each names the argument, the file and the place, whatever invalid_rows says, and leaves nothing behind."""
    for invalid_rows in ("refuse", "skip"):
        with pytest.raises(DataError, match=f"^data: .*{message}"):
            preferences(bad_file(tmp_path, name, content), tokenizer, template, invalid_rows=invalid_rows)
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("prompts", "chosen", "rejected"), r"'prompt'; it has 'prompts', .*; did you mean --prompt-key prompts\?"),
        (
            ("prompt", "best", "rejected"),
            "'chosen'; it has 'prompt', 'best', 'rejected'; name the column by --chosen-key",
        ),
        (("prompt", "chosen", "reject"), r"'rejected'; it has .*; did you mean --rejected-key reject\?"),
    ],
)
def test_missing_column(tmp_path, tokenizer, template, columns, message):
    rows = [dict(zip(columns, ("a", "b", "c"), strict=True))] * 2
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "d.parquet"))
    for data in (write_jsonl(tmp_path / "d.jsonl", rows), str(tmp_path / "d.parquet")):
        with pytest.raises(DataError, match=f"^data: '{data}' has no column {message}"):
            preferences(data, tokenizer, template, invalid_rows="skip")
    with pytest.raises(DataError, match="no column 'context_messages' or 'prompt' or 'instruction'; it has 'x'"):
        prompts(write_jsonl(tmp_path / "p.jsonl", [{"x": "a"}]), tokenizer, template)
    with pytest.raises(DataError, match="no column 'response' or 'completion' or 'messages' or 'chosen'; it has 'x'"):
        sft(str(tmp_path / "p.jsonl"), tokenizer, template)


def test_nothing_there(tmp_path, tokenizer, template, monkeypatch):
    write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", ROWS)
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setattr(datasets, "load_dataset", Hub({}, datasets.load_dataset))
    cases = [
        (tmp_path / "pair.jsonl", r"data: no file or folder '.*pair.jsonl'; did you mean '.*pairs.jsonl'\?"),
        (tmp_path / "quite-another", r"data: no file or folder '.*quite-another'$"),
        ("nowhere/pairs.parquet", "data: no file or folder 'nowhere/pairs.parquet'"),
        (tmp_path / "folder", r"data: folder .* was not saved by .*save_to_disk .*path: train.jsonl"),
        (tmp_path / "saved", "data: .*saved' has no split 'test'; it has train; see --data-split"),
        (
            "owner/set",
            "data: 'owner/set' is no local file or folder, and the Hub gave no .*: Couldn't reach 'owner/set'",
        ),
    ]
    for name, message in cases:
        with pytest.raises(DataError, match=message):
            preferences(str(name), tokenizer, template, data_split="test")
    good = str(tmp_path / "pairs.jsonl")
    with pytest.raises(DataError, match="eval_data: no file or folder"):
        preferences(good, tokenizer, template, eval_data=str(tmp_path / "gone.jsonl"))
    assert issubclass(DataError, ConfigError)


CHAT = as_conversations(ROWS)[0]
BAD_ROWS = [
    ({k: v for k, v in ROWS[1].items() if k != "rejected"}, "missing key", "'rejected' is missing"),
    (ROWS[1] | {"prompt": None}, "missing key", "'prompt' is missing"),
    (ROWS[1] | {"chosen": " \n"}, "empty text", "'chosen' is empty"),
    (ROWS[1] | {"prompt": ""}, "empty text", "'prompt' is empty"),
    (ROWS[1] | {"prompt": []}, "empty text", "'prompt' is an empty list"),
    (ROWS[1] | {"rejected": 7}, "not text", "'rejected' is int where text was expected: '7'"),
    (ROWS[1] | {"prompt": ["Who?"]}, "not text", r"'prompt\[0\]' is str where a message was expected"),
    (ROWS[1] | {"rejected": ROWS[1]["chosen"]}, "chosen = rejected", "'chosen' and 'rejected' are the same"),
    (ROWS[1] | {"prompt": CHAT["chosen"]}, "no turn to answer", "'prompt' ends in an assistant turn"),
    (CHAT | {"rejected": CHAT["chosen"][:1]}, "no assistant turn", "'rejected' ends in a turn of 'user'"),
    (CHAT | {"prompt": None, "rejected": as_conversations(ROWS)[1]["rejected"]}, "prompts differ", "do not share"),
    (CHAT | {"prompt": [turn("user", "Else?")]}, "prompts differ", "'chosen' are not those of 'prompt'"),
    (CHAT | {"chosen": [{"role": "user"}, CHAT["chosen"][1]]}, "missing key", r"'chosen\[0\].content' is missing"),
    (CHAT | {"chosen": [{"from": "user"}, CHAT["chosen"][1]]}, "missing key", r"'chosen\[0\].role' is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason", "detail"), BAD_ROWS)
def test_bad_rows(tmp_path, tokenizer, template, capsys, row, reason, detail):
    data = write_jsonl(tmp_path / "d.jsonl", [ROWS[0], row, ROWS[2], row])
    message = rf"^data: '.*d.jsonl', line 2: .*{detail}.* \({reason}; the first of 2 unusable rows in 4\); mend"
    with pytest.raises(DataError, match=message):
        preferences(data, tokenizer, template)
    assert capsys.readouterr().out == ""
    got = preferences(data, tokenizer, template, invalid_rows="skip")
    assert (got.rows, got.counts) == ([0, 2], Counts(4, 2, {reason: 2}))
    assert capsys.readouterr().out == f"data {data}: 4 rows, 2 kept, 2 skipped ({reason}: 2)\n"


def test_no_usable_row(tmp_path, tokenizer, template):
    data = write_jsonl(tmp_path / "d.jsonl", [ROWS[0] | {"prompt": ""}, ROWS[1] | {"chosen": 1}])
    message = r"data: no usable row in '.*d.jsonl': 2 rows, 0 kept, 2 skipped \(empty text: 1, not text: 1\)"
    with pytest.raises(DataError, match=message):
        preferences(data, tokenizer, template, invalid_rows="skip")


def test_bad_row_of_a_typed_source_is_named_by_its_row(tmp_path, tokenizer, template):
    datasets.Dataset.from_list([ROWS[0], ROWS[1] | {"chosen": None}]).to_parquet(str(tmp_path / "d.parquet"))
    with pytest.raises(DataError, match=r"d.parquet', row 1 \(from 0\): 'chosen' is missing"):
        preferences(str(tmp_path / "d.parquet"), tokenizer, template)
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Who?"}, {"prompt": 3}])
    with pytest.raises(DataError, match=r"d.jsonl', line 2: 'prompt' is int"):
        prompts(data, tokenizer, template)
    data = write_jsonl(tmp_path / "s.jsonl", [{"prompt": "Who?", "response": "I."}, {"prompt": "Who?"}])
    with pytest.raises(DataError, match=r"s.jsonl', line 2: 'response' is missing"):
        sft(data, tokenizer, template)


def test_conversation_the_template_refuses(tmp_path, tokenizer):
    template = load_template("auto", byte_tokenizer(REFUSING))
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Who?"}, {"prompt": [turn("system", "s"), turn("user", "u")]}])
    with pytest.raises(DataError, match=r"line 2: the chat template refuses the conversation: no system turn"):
        prompts(data, tokenizer, template)
    got = prompts(data, tokenizer, template, invalid_rows="skip")
    assert got.counts == Counts(2, 1, {"refused by the template": 1})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", GOOD + f'{{"prompt": {"7" * 5000}}}\n', "line 2: a number of too many digits"),
        ("d.jsonl", GOOD + f'{{"prompt": {"[" * 10**5}}}\n', "line 2: lists or objects nested too deeply"),
        ("d.json", f"[{GOOD}, {'[' * 10**5}]", "d.json'.*nested too deeply"),
        ("d.jsonl", "\n".join(json.dumps(r, indent=1) for r in ROWS), "line 1, .*an object over several lines"),
        ("d.json", json.dumps(ROWS[0], indent=1), "line 1, .*an object over several lines .*pretty-printed"),
        ("d.jsonl", json.dumps(ROWS, indent=1), "line 1, .*a JSON list over several lines; name the file .json"),
    ],
)  # fmt: skip
def test_json_that_python_does_not_take(tmp_path, tokenizer, template, name, content, message):
    with pytest.raises(DataError, match=message):
        preferences(bad_file(tmp_path, name, content), tokenizer, template)


def test_nesting_that_is_read_and_cannot_be_used(tmp_path, tokenizer, template):
    """Near the interpreter's limit a row ends in rows or in a refusal, wherever the limit is met."""
    for depth in range(200, 1000, 50):
        value = "[" * depth + "]" * depth
        data = bad_file(tmp_path, f"d{depth}.jsonl", f'{{"prompt": "a", "response": "b", "x": {value}}}\n')
        try:
            assert len(sft(data, tokenizer, template)) == 1
        except DataError as e:
            assert "nested too deeply" in str(e)  # noqa: PT017 - either end is right
