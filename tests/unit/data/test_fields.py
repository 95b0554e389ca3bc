"""No field that changes what is learnt is dropped in silence: it is read, or the row is refused."""

from __future__ import annotations

import csv
import json

import datasets
import pytest
from data_helpers import ROWS, as_conversations, preferences, prompts, sft, turn, write_jsonl
from test_chat_template import byte_tokenizer

from rto_fast.config import DPOConfig
from rto_fast.data.chat_template import load_template
from rto_fast.data.load import load_answers
from rto_fast.errors import DataError

TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLED = '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call>'
USED = [
    turn("user", "Is it wet?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "rain", "tool_call_id": "1"},
    turn("assistant", "Yes."),
]


@pytest.fixture(scope="module")
def tools():
    return load_template("auto", byte_tokenizer(TOOLS))


def test_tool_calls_reach_the_template(tmp_path, tokenizer, tools):
    """In the prompt and as the answer, with and without text beside them, arguments as an object or as JSON text."""
    for beside, arguments in ((None, {"city": "Oslo"}), ("I look.", '{"city": "Oslo"}'), ("", {"city": "Oslo"})):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        turns = [USED[0], {"role": "assistant", "content": beside, "tool_calls": [call]}, *USED[2:]]
        got = sft(write_jsonl(tmp_path / "s.jsonl", [{"messages": turns}, {"messages": turns[:2]}]), tokenizer, tools)
        called = f"{beside or ''}{CALLED}<|im_end|>"
        first, second = (tokenizer.decode(ids) for ids in got.prompt_ids)
        assert first == (
            "<|im_start|>user\nIs it wet?<|im_end|>\n<|im_start|>assistant\n"
            + called
            + "\n<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n"
        )
        assert second.endswith("wet?<|im_end|>\n<|im_start|>assistant\n")
        assert [tokenizer.decode(ids) for ids in got.response_ids] == ["Yes.<|im_end|>", called]
    row = {"prompt": "Is it wet?", "chosen": [USED[1]], "rejected": [turn("assistant", "No.")]}
    pairs = preferences(write_jsonl(tmp_path / "p.jsonl", [row]), tokenizer, tools)
    assert tokenizer.decode(pairs.chosen_ids[0]) == CALLED + "<|im_end|>"
    sampled = prompts(write_jsonl(tmp_path / "r.jsonl", [{"prompt": USED[:3]}]), tokenizer, tools)
    assert CALLED in sampled.texts[0]
    typed = datasets.Dataset.from_list([{"messages": USED}])  # every message gets every field, empty ones as None
    typed.to_parquet(str(tmp_path / "t.parquet"))
    assert tokenizer.decode(sft(str(tmp_path / "t.parquet"), tokenizer, tools).prompt_ids[0]) == first.replace(
        called, CALLED + "<|im_end|>"
    )


def test_reasoning_reaches_the_template(tmp_path, tokenizer, tools):
    turns = [turn("user", "2 + 2?"), {"role": "assistant", "content": "4", "reasoning_content": "Two twos."}]
    got = sft(write_jsonl(tmp_path / "s.jsonl", [{"messages": turns}]), tokenizer, tools)
    assert tokenizer.decode(got.response_ids[0]) == "<think>Two twos.</think>4<|im_end|>"


@pytest.mark.parametrize(
    ("field", "value"),
    [("tool_calls", [CALL]), ("reasoning_content", "Two twos."), ("thinking", "Two twos."), ("images", ["a.png"])],
)
@pytest.mark.parametrize("kind", ["plain", "chatml"])
def test_fields_without_a_place_in_the_template_are_refused(tmp_path, tokenizer, template, chatml, kind, field, value):
    """CHATML and the plain template write role and content alone."""
    turns = [turn("user", "2 + 2?"), turn("assistant", "4") | {field: value}]
    data = write_jsonl(tmp_path / "s.jsonl", [{"messages": [*turns[:1], turn("assistant", "4")]}, {"messages": turns}])
    with pytest.raises(DataError, match=rf"line 2: .*{field}'.* has no place"):
        sft(data, tokenizer, chatml if kind == "chatml" else template)
    empty = [*turns[:1], turn("assistant", "4") | {field: None}]
    assert len(sft(write_jsonl(tmp_path / "e.jsonl", [{"messages": empty}]), tokenizer, template)) == 1


@pytest.mark.parametrize("column", ["tools", "images", "history", "documents"])
def test_columns_without_a_reader_are_refused(tmp_path, tokenizer, chatml, column):
    rows = [{"prompt": "a", "response": "b", column: []}, {"prompt": "a", "response": "b", column: ["x"]}]
    with pytest.raises(DataError, match=f"line 2: .*{column!r}.*field not read"):
        sft(write_jsonl(tmp_path / "s.jsonl", rows), tokenizer, chatml)
    with pytest.raises(DataError, match=f"line 2: .*{column!r}.*field not read"):
        prompts(write_jsonl(tmp_path / "s.jsonl", rows), tokenizer, chatml)
    named = prompts(write_jsonl(tmp_path / "p.jsonl", [{column: "a"}]), tokenizer, chatml, prompt_key=column)
    assert named.prompts == ["a"]


@pytest.mark.parametrize("extra", ["input", "context"])
def test_input_of_an_instruction(tmp_path, tokenizer, chatml, extra):
    """Alpaca's `input` and Dolly's `context` belong to the prompt; an empty one adds nothing."""
    rows = [
        {"instruction": "Sort these.", extra: "b a", "output": "a b"},
        {"instruction": "Hi.", extra: "", "output": "Hi."},
    ]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    assert prompts(data, tokenizer, chatml).prompts == ["Sort these.\n\nb a", "Hi."]
    got = sft(data, tokenizer, chatml, prompt_key="instruction", response_key="output")
    assert got.prompt_ids[0] == chatml.encode_prompt(tokenizer, "Sort these.\n\nb a")
    bad = write_jsonl(tmp_path / "e.jsonl", [rows[0] | {extra: 3}])
    with pytest.raises(DataError, match=f"line 1: '{extra}' is int"):
        prompts(bad, tokenizer, chatml)


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_system_column(tmp_path, tokenizer, chatml, column):
    brief, asked = turn("system", "Be brief."), turn("user", "Who?")
    rows = [
        {column: "Be brief.", "prompt": "Who?", "chosen": "I.", "rejected": "You."},
        {column: "Be brief.", "prompt": [asked], "chosen": "I.", "rejected": "You."},
        {column: "Be brief.", "prompt": [brief, asked], "chosen": "I.", "rejected": "You."},
        {column: "Be brief.", "prompt": "Who?"}
        | {k: [asked, turn("assistant", v)] for k, v in (("chosen", "I."), ("rejected", "You."))},
    ]
    expected = chatml.encode_pair(tokenizer, [brief, asked], "I.")
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    got = preferences(data, tokenizer, chatml)
    assert [*zip(got.prompt_ids, got.chosen_ids, strict=True)] == [expected] * 4
    assert prompts(data, tokenizer, chatml).prompts == [[brief, asked]] * 4
    empty = write_jsonl(tmp_path / "e.jsonl", [rows[0] | {column: ""}, rows[0] | {column: None}])
    assert prompts(empty, tokenizer, chatml).prompts == ["Who?"] * 2
    other = write_jsonl(tmp_path / "o.jsonl", [rows[2] | {column: "Be long."}])
    with pytest.raises(DataError, match=f"line 1: '{column}' is not the system turn"):
        preferences(other, tokenizer, chatml)


def test_message_lists_as_text(tmp_path, tokenizer, chatml):
    """As CSV must have them and Parquet may; a list as Python prints it is refused, and JSON's text stays text."""
    full = as_conversations(ROWS)
    rows = [{k: json.dumps(r[k]) for k in ("chosen", "rejected")} for r in full]
    expected = preferences(write_jsonl(tmp_path / "d.jsonl", ROWS), tokenizer, chatml)
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "d.parquet"))
    write_csv(tmp_path / "d.csv", rows)
    for name in ("d.parquet", "d.csv"):
        got = preferences(str(tmp_path / name), tokenizer, chatml)
        assert (got.prompt_ids, got.chosen_ids, got.rejected_ids) == (
            expected.prompt_ids, expected.chosen_ids, expected.rejected_ids,
        )  # fmt: skip
        sampled = prompts(str(tmp_path / name), tokenizer, chatml, prompt_key="auto")
        assert list(sampled.prompt_ids) == list(expected.prompt_ids)
    printed = [{"prompt": str([turn("user", r["prompt"])]), "response": r["chosen"]} for r in ROWS]
    datasets.Dataset.from_list(printed).to_parquet(str(tmp_path / "p.parquet"))
    write_csv(tmp_path / "p.csv", printed)
    for name, at in (("p.parquet", "row 0"), ("p.csv", "line 2")):
        with pytest.raises(DataError, match=rf"{at}.*'prompt' is a message list that is no JSON"):
            sft(str(tmp_path / name), tokenizer, chatml)
    literal = write_jsonl(tmp_path / "l.jsonl", [{"prompt": "Two turns as JSON", "response": rows[0]["chosen"]}])
    assert tokenizer.decode(sft(literal, tokenizer, chatml).response_ids[0]).startswith('[{"role"')


def test_a_name_that_comes_twice(tmp_path, tokenizer, chatml):
    (tmp_path / "d.csv").write_text("prompt,response,prompt\na,b,c\n")
    (tmp_path / "d.jsonl").write_text(
        '{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "b", "prompt": "c"}\n'
    )
    (tmp_path / "d.json").write_text('[{"prompt": "a", "response": "b"}, {"prompt": [{"role": "user", "role": "x"}]}]')
    for name, message in (
        ("d.csv", "line 1: column 'prompt' comes twice"),
        ("d.jsonl", "line 2: key 'prompt' comes twice"),
        ("d.json", r"row 1 \(from 0\): key 'role' comes twice"),
    ):
        with pytest.raises(DataError, match=message):
            sft(str(tmp_path / name), tokenizer, chatml)


def test_labels_as_text(tmp_path, tokenizer, chatml):
    labels = ["true", "False", "1", "0", "TRUE", "1.0"]
    write_csv(tmp_path / "k.csv", [{"prompt": "a", "completion": f"b{i}", "label": x} for i, x in enumerate(labels)])
    config = DPOConfig(data=str(tmp_path / "k.csv"), model="m", max_length=200, eval_fraction=0.0, objective="kto")
    got = load_answers(config, tokenizer, chatml)[0]
    assert [bool(ids) for ids in got.chosen_ids] == [True, False, True, False, True, True]
    write_csv(tmp_path / "k.csv", [{"prompt": "a", "completion": "b", "label": "good"}])
    with pytest.raises(DataError, match="line 2: 'label' is 'good' where true or false was expected"):
        load_answers(config, tokenizer, chatml)


def test_a_prompt_beside_another_conversation_is_refused(tmp_path, tokenizer, chatml):
    """Where the responses are whole conversations, the prompt's text must be a turn of theirs, or all of them."""
    good = as_conversations(ROWS)[0]
    rendered = "Human: " + good["prompt"] + "\n\nAssistant:"
    for prompt in (good["prompt"], good["prompt"] + " ", rendered, None, ""):
        assert len(preferences(write_jsonl(tmp_path / "d.jsonl", [good | {"prompt": prompt}]), tokenizer, chatml)) == 1
    other = write_jsonl(tmp_path / "d.jsonl", [good | {"prompt": "Quite another."}])
    for load in (preferences, prompts):
        with pytest.raises(
            DataError, match=r"line 1: 'prompt' is none of the earlier turns of 'chosen'.*prompts differ"
        ):
            load(other, tokenizer, chatml)


def write_csv(path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
