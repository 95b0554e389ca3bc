"""Data sets of every source and format -> token ids; what is refused, skipped, counted, held out and cached."""

from __future__ import annotations

import csv
import json
import multiprocessing
import socket
from pathlib import Path

import datasets
import pytest
import torch
import torch.distributed as dist
from test_template import CHATML, REFUSING, STORIES, byte_tokenizer

from rto_fast import data as data_module
from rto_fast.config import ConfigError, PreferenceConfig, RTOConfig, SFTConfig
from rto_fast.data import Counts, DataError, TokenLists, load_preferences, load_prompts, load_sft
from rto_fast.template import load_template, load_tokenizer

DATA = Path(__file__).parents[1].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not (DATA.is_dir() and STORIES.is_dir()), reason=f"no {DATA.parent}")

ROWS = [
    {"prompt": "Once there was a dog", "chosen": "who barked at the cat.", "rejected": "at the dog."},
    {"prompt": "Who barks?", "chosen": "A dog does.", "rejected": "A cat does, once upon a time."},
    {"prompt": "Who purrs?", "chosen": "A cat does.", "rejected": "Nobody."},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The tokenised rows' folder, one a test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield tmp_path / "cache" / "rto_fast"
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def template(tokenizer):
    return load_template("plain", tokenizer)


@pytest.fixture(scope="module")
def chatml():
    return load_template("auto", byte_tokenizer(CHATML))


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def as_conversations(rows: list[dict]) -> list[dict]:
    """ultrafeedback_binarized's schema."""
    return [
        {
            "prompt": r["prompt"],
            "chosen": [turn("user", r["prompt"]), turn("assistant", r["chosen"])],
            "rejected": [turn("user", r["prompt"]), turn("assistant", r["rejected"])],
            "score_chosen": 8.0,
            "score_rejected": 3.0,
        }
        for r in rows
    ]


def preferences(data: str, tokenizer, template, **settings):
    settings = {"max_length": 200, "eval_fraction": 0.0} | settings
    return load_preferences(PreferenceConfig(data=data, model="m", **settings), tokenizer, template)[0]


def prompts(data: str, tokenizer, template, **settings):
    return load_prompts(RTOConfig(data=data, policy="m", **settings), tokenizer, template)


def sft(data: str, tokenizer, template, **settings):
    settings = {"max_length": 200, "eval_fraction": 0.0} | settings
    return load_sft(SFTConfig(data=data, model="m", **settings), tokenizer, template)[0]


# ---------------------------------------------------------------------------------------------- real data


@needs_shared
def test_real_messages_counts(capsys):
    tokenizer = load_tokenizer(str(STORIES))
    template = load_template("auto", tokenizer)
    name = str(DATA / "preferences.jsonl")
    config = {"data": name, "model": "m", "max_length": 512}
    train, held_out = load_preferences(PreferenceConfig(**config), tokenizer, template)
    counts = Counts(total=1200, kept=240, skipped={"longer than the limit": 960})
    assert (train.counts, held_out.counts, len(train), len(held_out)) == (counts, counts, 228, 12)
    assert capsys.readouterr().out == (f"data {name}: 1,200 rows, 240 kept, 960 skipped (longer than the limit: 960)\n")
    for p, c, r in zip(train.prompt_ids, train.chosen_ids, train.rejected_ids, strict=True):
        assert p[0] == 1
        assert c[-1] == r[-1] == 2
        assert len(p) + max(len(c), len(r)) <= 512

    cut, _ = load_preferences(PreferenceConfig(**config, overlong="truncate", eval_fraction=0), tokenizer, template)
    assert cut.counts == Counts(1200, 1182, {"prompt alone longer than the limit": 18}, truncated=942)
    longest = cut.prompt_ids.lengths + (cut.chosen_ids.lengths.clip(cut.rejected_ids.lengths))
    assert (longest.max(), int((longest == 512).sum()) >= 942) == (512, True)

    sampled = prompts(name, tokenizer, template, max_prompt_length=256)
    assert sampled.counts == Counts(1200, 1099, {"longer than the limit": 101})
    both = dict(zip(sampled.rows, sampled.prompt_ids, strict=True))
    assert all(both[row] == p for row, p in zip(cut.rows, cut.prompt_ids, strict=True) if row in both)

    supervised, _ = load_sft(SFTConfig(**config, max_rows=300), tokenizer, template)
    assert supervised.counts == Counts(300, 75, {"longer than the limit": 225})

    with pytest.raises(
        DataError, match=r"preferences.jsonl', line 1: 774 tokens, over max_length 512 \(the first of 960"
    ):
        preferences(name, tokenizer, template, max_length=512, overlong="refuse")


@needs_shared
def test_real_stories_round_trip():
    """Decoding prompt and response gives back the story, for 400 sampled continuations, torn words and all."""
    tokenizer = load_tokenizer(str(STORIES))
    template = load_template("auto", tokenizer)
    name = str(DATA / "story_preferences.jsonl")
    pairs = preferences(name, tokenizer, template, max_length=512, max_rows=400)
    assert pairs.counts == Counts(400, 400, {})
    sampled = prompts(name, tokenizer, template, max_rows=400)
    assert sampled.prompt_ids == pairs.prompt_ids
    with open(name) as f:
        rows = [json.loads(next(f)) for _ in range(400)]
    assert sampled.texts == sampled.prompts == [r["prompt"] for r in rows]
    for row, p, c in zip(rows, pairs.prompt_ids, pairs.chosen_ids, strict=True):
        space = "" if row["chosen"][0].isspace() or row["prompt"][-1].isspace() else " "
        assert tokenizer.decode(p[1:] + c[:-1]) == row["prompt"] + space + row["chosen"]


# ---------------------------------------------------------------------------------------------- formats


def test_preference_formats_agree(tmp_path, tokenizer, chatml):
    """Strings, messages with and without the earlier turns, with and without a prompt column: the same ids."""
    full = as_conversations(ROWS)
    formats = {
        "strings": ROWS,
        "ultrafeedback": full,
        "implicit prompt": [{k: r[k] for k in ("chosen", "rejected")} for r in full],
        "explicit messages": [
            {"prompt": r["chosen"][:1], "chosen": r["chosen"][1:], "rejected": r["rejected"][1:]} for r in full
        ],
        "message prompt, whole conversations": [r | {"prompt": r["chosen"][:1]} for r in full],
        "string prompt, one message": [r | {k: r[k][1:] for k in ("chosen", "rejected")} for r in full],
        "message prompt, strings": [r | {"prompt": [turn("user", r["prompt"])]} for r in ROWS],
        "mixed": [ROWS[0], full[1], ROWS[2]],
    }
    for name, rows in formats.items():
        got = preferences(write_jsonl(tmp_path / f"{name}.jsonl", rows), tokenizer, chatml)
        assert got.rows == [0, 1, 2], name
        for row, p, c, r in zip(ROWS, got.prompt_ids, got.chosen_ids, got.rejected_ids, strict=True):
            assert (p, c) == chatml.encode_pair(tokenizer, row["prompt"], row["chosen"]), name
            assert (p, r) == chatml.encode_pair(tokenizer, row["prompt"], row["rejected"]), name


def test_conversations_of_several_turns(tmp_path, tokenizer, chatml):
    head = [turn("system", ""), turn("user", "Who?"), turn("assistant", "A dog."), turn("user", "Sure?")]
    row = {k: [*head, turn("assistant", v)] for k, v in (("chosen", "Yes."), ("rejected", "No."))}
    got = preferences(write_jsonl(tmp_path / "d.jsonl", [row]), tokenizer, chatml)
    assert (got.prompt_ids[0], got.chosen_ids[0]) == chatml.encode_pair(tokenizer, head, "Yes.")
    got = sft(write_jsonl(tmp_path / "s.jsonl", [{"messages": row["chosen"]}]), tokenizer, chatml)
    assert (got.prompt_ids[0], got.response_ids[0]) == chatml.encode_pair(tokenizer, head, "Yes.")
    got = prompts(write_jsonl(tmp_path / "p.jsonl", [row]), tokenizer, chatml)
    assert got.messages == got.prompts == [head]


def test_own_keys(tmp_path, tokenizer, template):
    rows = [{"q": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in ROWS]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    expected = preferences(write_jsonl(tmp_path / "e.jsonl", ROWS), tokenizer, template)
    got = preferences(data, tokenizer, template, prompt_key="q", chosen_key="good", rejected_key="bad")
    assert got.chosen_ids == expected.chosen_ids
    assert got.rejected_ids == expected.rejected_ids
    assert prompts(data, tokenizer, template, prompt_key="q").prompt_ids == expected.prompt_ids
    assert sft(data, tokenizer, template, prompt_key="q", response_key="good").response_ids == expected.chosen_ids


@pytest.mark.parametrize("key", ["context_messages", "prompt", "instruction"])
def test_prompt_columns(tmp_path, tokenizer, chatml, key):
    texts = [r["prompt"] for r in ROWS]
    value = (lambda t: [turn("user", t)]) if key == "context_messages" else str
    others = {"instruction": "not this", "output": 1}
    got = prompts(write_jsonl(tmp_path / "d.jsonl", [others | {key: value(t)} for t in texts]), tokenizer, chatml)
    assert list(got.prompt_ids) == [chatml.encode_prompt(tokenizer, t) for t in texts]
    assert got.texts == [chatml.text_of(tokenizer, t) for t in texts]
    assert got.messages == [[turn("user", t)] for t in texts]
    assert got.prompts == [value(t) for t in texts]
    assert (got.rows, got.counts, len(got)) == ([0, 1, 2], Counts(3, 3, {}), 3)


def test_all_stages_see_one_prompt(tmp_path, tokenizer, template):
    """A conversation is written with its roles under the plain template: in sampling as in training."""
    data = write_jsonl(tmp_path / "d.jsonl", as_conversations(ROWS))
    pairs = preferences(data, tokenizer, template)
    assert prompts(data, tokenizer, template).prompt_ids == pairs.prompt_ids
    assert sft(data, tokenizer, template).prompt_ids == pairs.prompt_ids
    assert tokenizer.decode(pairs.prompt_ids[1]) == "<|bos|>User: Who barks?\n\nAssistant:"
    stated = prompts(data, tokenizer, template, prompt_key="prompt")
    assert stated.texts == [r["prompt"] for r in ROWS]


@pytest.mark.parametrize("key", ["response", "completion", "chosen", "messages"])
def test_sft_columns(tmp_path, tokenizer, chatml, key):
    rows = [{"prompt": r["prompt"], key: r["chosen"]} for r in ROWS]
    if key == "messages":
        rows = [{key: r["chosen"]} for r in as_conversations(ROWS)]
    got = sft(write_jsonl(tmp_path / "d.jsonl", rows), tokenizer, chatml)
    for r, p, a in zip(ROWS, got.prompt_ids, got.response_ids, strict=True):
        assert (p, a) == chatml.encode_pair(tokenizer, r["prompt"], r["chosen"])
    assert (got.rows, len(got)) == ([0, 1, 2], 3)


# ---------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("rows", [ROWS, as_conversations(ROWS)], ids=["strings", "messages"])
def test_sources_agree(tmp_path, tokenizer, template, monkeypatch, rows):
    expected = preferences(write_jsonl(tmp_path / "d.jsonl", rows), tokenizer, template)
    typed = datasets.Dataset.from_list(rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    write_jsonl(tmp_path / "lines.json", rows)
    (tmp_path / "bom.jsonl").write_text("\n\n".join(json.dumps(r) for r in rows), encoding="utf-8-sig")
    typed.to_parquet(str(tmp_path / "d.parquet"))
    typed.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=typed.select([0]), other=typed).save_to_disk(str(tmp_path / "splits"))
    monkeypatch.setattr(datasets, "load_dataset", hub := Hub({("owner/set", "other"): typed}, datasets.load_dataset))
    names = ["list.json", "lines.json", "bom.jsonl", "d.parquet", "saved", "splits"]
    if rows is ROWS:
        names.append("d.csv")
        with open(tmp_path / "d.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    for name in [str(tmp_path / n) for n in names] + ["owner/set"]:
        got = preferences(name, tokenizer, template, data_split="other")
        assert got.prompt_ids == expected.prompt_ids, name
        assert got.chosen_ids == expected.chosen_ids, name
        assert got.rejected_ids == expected.rejected_ids, name
        assert len(preferences(name, tokenizer, template, data_split="other", max_rows=2)) == 2, name
    assert hub.asked == [("owner/set", "other")] * 2


class Hub:
    """Stands for datasets.load_dataset where there is no network: some Hub ids are known, files go to the real one."""

    def __init__(self, known: dict, real):
        self.known, self.real, self.asked = known, real, []

    def __call__(self, name: str, split: str, **settings):
        if settings:
            return self.real(name, split=split, **settings)
        self.asked.append((name, split))
        if (name, split) not in self.known:
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub")
        return self.known[name, split]


def test_csv_values_are_text(tmp_path, tokenizer, template):
    """Numbers, NA and quoted line breaks stand as they are written."""
    (tmp_path / "d.csv").write_text('prompt,response\n1,2.50\nNA,"two\nlines"\n')
    got = sft(str(tmp_path / "d.csv"), tokenizer, template)
    for ids, pair in zip(
        zip(got.prompt_ids, got.response_ids, strict=True), [("1", "2.50"), ("NA", "two\nlines")], strict=True
    ):
        assert ids == template.encode_pair(tokenizer, *pair)


# ---------------------------------------------------------------------------------------------- refused


def bad_file(tmp_path: Path, name: str, content: str | bytes) -> str:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(tmp_path / name)


GOOD = json.dumps(ROWS[0]) + "\n"


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
    (CHAT | {"rejected": as_conversations(ROWS)[1]["rejected"]}, "prompts differ", "do not share their earlier turns"),
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


# ---------------------------------------------------------------------------------------------- limits


def test_overlong_pairs(tmp_path, tokenizer, template):
    twin = "the same words at the start, " * 3
    long_prompt = {"prompt": "dog " * 60, "chosen": "a", "rejected": "b"}
    rows = [*ROWS, long_prompt, {"prompt": "Who?", "chosen": twin + "a", "rejected": twin + "b"}]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    everything = preferences(data, tokenizer, template, max_length=500)
    assert everything.counts == Counts(5, 5, {})
    lengths = [len(everything.prompt_ids[i]) + len(everything.chosen_ids[i]) for i in range(5)]
    lengths = [max(n, len(everything.prompt_ids[i]) + len(everything.rejected_ids[i])) for i, n in enumerate(lengths)]
    limit = lengths[1] - 2
    assert lengths[0] <= limit
    assert lengths[2] <= limit

    first = rf"line 2: {lengths[1]} tokens, over max_length {limit} \(the first of 3 such rows in 5"
    with pytest.raises(
        DataError,
        match=rf"{first}, the longest has {max(lengths)}\); raise --max-length, or pass --overlong skip or truncate",
    ):
        preferences(data, tokenizer, template, max_length=limit, overlong="refuse")
    got = preferences(data, tokenizer, template, max_length=limit)
    assert (got.rows, got.counts) == ([0, 2], Counts(5, 2, {"longer than the limit": 3}))
    got = preferences(data, tokenizer, template, max_length=limit, overlong="truncate")
    skipped = {"chosen = rejected once cut": 1, "prompt alone longer than the limit": 1}
    assert (got.rows, got.counts) == ([0, 1, 2], Counts(5, 3, skipped, truncated=1))
    assert str(got.counts) == (
        "5 rows, 3 kept (1 of them cut to the limit), "
        "2 skipped (chosen = rejected once cut: 1, prompt alone longer than the limit: 1)"
    )
    assert list(got.prompt_ids) == list(everything.prompt_ids)[:3]
    assert got.chosen_ids[1] == everything.chosen_ids[1]
    assert got.rejected_ids[1] == everything.rejected_ids[1][:-2]
    assert got.rejected_ids[0][-1] == tokenizer.eos_token_id
    with pytest.raises(DataError, match=r"no usable row in .*longer than the limit: 5.*max_length is 3"):
        preferences(data, tokenizer, template, max_length=3)


def test_overlong_prompts_and_responses(tmp_path, tokenizer, template):
    rows = [{"prompt": "Who?", "response": "dog " * 50}, {"prompt": "dog " * 50, "response": "I."}]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    for overlong in ("skip", "truncate"):
        got = prompts(data, tokenizer, template, max_prompt_length=20, overlong=overlong)
        assert (got.rows, got.counts) == ([0], Counts(2, 1, {"longer than the limit": 1}))
    with pytest.raises(DataError, match=r"line 2: .* tokens, over max_prompt_length 20 .*, or pass --overlong skip$"):
        prompts(data, tokenizer, template, max_prompt_length=20, overlong="refuse")
    got = sft(data, tokenizer, template, max_length=20, overlong="truncate")
    assert got.counts == Counts(2, 1, {"prompt alone longer than the limit": 1}, truncated=1)
    assert len(got.prompt_ids[0]) + len(got.response_ids[0]) == 20


def test_max_rows_reads_no_further(tmp_path, tokenizer, template):
    data = bad_file(tmp_path, "d.jsonl", GOOD + "{broken\n")
    assert len(preferences(data, tokenizer, template, max_rows=1)) == 1
    with pytest.raises(DataError, match=r"line 2, column 2: malformed"):
        preferences(data, tokenizer, template, max_rows=2)


# ---------------------------------------------------------------------------------------------- held-out rows


def test_held_out_share(tmp_path, tokenizer, template):
    rows = [{"prompt": f"story {i % 40}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(120)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)

    def split(**settings):
        config = PreferenceConfig(data=data, model="m", max_length=200, **settings)
        return load_preferences(config, tokenizer, template)

    train, held_out = split(eval_fraction=0.1)
    assert (len(train), len(held_out)) == (108, 12)
    assert sorted(train.rows + held_out.rows) == list(range(120))
    assert not {r % 40 for r in train.rows} & {r % 40 for r in held_out.rows}
    again, other = split(eval_fraction=0.1)[1], split(eval_fraction=0.1, seed=1)[1]
    assert again.rows == held_out.rows
    assert other.rows != held_out.rows
    assert train.rows == sorted(train.rows)
    assert [len(part) for part in split(eval_fraction=0)] == [120, 0]
    for i, row in enumerate(held_out.rows):
        assert held_out.chosen_ids[i] == template.encode_pair(tokenizer, rows[row]["prompt"], rows[row]["chosen"])[1]

    one_prompt = write_jsonl(tmp_path / "one.jsonl", [r | {"prompt": "story"} for r in rows])
    config = SFTConfig(data=one_prompt, model="m", max_length=200, eval_fraction=0.05)
    assert [len(part) for part in load_sft(config, tokenizer, template)] == [114, 6]


def test_held_out_file(tmp_path, tokenizer, template, capsys):
    data, other = write_jsonl(tmp_path / "d.jsonl", ROWS), write_jsonl(tmp_path / "e.jsonl", [ROWS[1]] * 2)
    config = PreferenceConfig(data=data, model="m", max_length=200, eval_fraction=0.5, eval_data=other)
    train, held_out = load_preferences(config, tokenizer, template)
    assert (train.rows, held_out.rows) == ([0, 1, 2], [0, 1])
    assert held_out.prompt_ids == [train.prompt_ids[1]] * 2
    assert capsys.readouterr().out.splitlines() == [
        f"data {data}: 3 rows, 3 kept",
        f"eval_data {other}: 2 rows, 2 kept",
    ]


def test_split_to_evaluate_on(tmp_path, tokenizer, template):
    """Of a saved dictionary its rows; a file or a folder without splits must not be evaluated on what it trains."""
    file, saved, folder = write_jsonl(tmp_path / "d.jsonl", ROWS * 4), tmp_path / "saved", tmp_path / "plain"
    parts = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS[:2]), test=datasets.Dataset.from_list(ROWS[2:]))
    parts.save_to_disk(str(saved))
    datasets.Dataset.from_list(ROWS * 4).save_to_disk(str(folder))

    def split(data):
        config = PreferenceConfig(data=str(data), model="m", max_length=200, eval_fraction=0.4, eval_split="test")
        return load_preferences(config, tokenizer, template)

    assert [part.rows for part in split(saved)] == [[0, 1], [0]]
    for data in (file, folder):
        train, held_out = split(data)
        assert len(held_out) == 4
        assert sorted(train.rows + held_out.rows) == list(range(12))


# ---------------------------------------------------------------------------------------------- cache and ranks


@pytest.fixture
def tokenised(monkeypatch) -> list[str]:
    """Names of the data sets that were tokenised rather than taken from the cache."""
    done: list[str] = []
    real = data_module._tokenise

    def count(config, *rest):
        done.append(config.data)
        return real(config, *rest)

    monkeypatch.setattr(data_module, "_tokenise", count)
    return done


def test_cache_is_used_and_keyed(tmp_path, tokenizer, template, chatml, cache, tokenised):
    data = write_jsonl(tmp_path / "d.jsonl", ROWS)
    first = preferences(data, tokenizer, template)
    again = preferences(data, tokenizer, template, max_length=60, overlong="truncate", data_workers=2)
    assert len(tokenised) == 1
    assert again.chosen_ids == first.chosen_ids
    copy = write_jsonl(tmp_path / "copy.jsonl", ROWS)
    assert preferences(copy, tokenizer, template).rejected_ids == first.rejected_ids
    assert len(tokenised) == 1

    other_tokenizer = byte_tokenizer()
    other_tokenizer.add_tokens(["barked"])
    variants = [
        lambda: preferences(data, tokenizer, chatml),
        lambda: preferences(data, other_tokenizer, template),
        lambda: preferences(data, tokenizer, template, max_rows=2),
        lambda: preferences(data, tokenizer, template, chosen_key="rejected", rejected_key="chosen"),
        lambda: sft(data, tokenizer, template),
        lambda: prompts(data, tokenizer, template),
        lambda: preferences(write_jsonl(tmp_path / "d.jsonl", ROWS[::-1]), tokenizer, template),
    ]
    for n, variant in enumerate(variants, start=2):
        made, taken = variant(), variant()
        assert len(tokenised) == n
        assert made.prompt_ids == taken.prompt_ids
    assert list(preferences(data, tokenizer, template).prompt_ids) == list(first.prompt_ids)[::-1]
    assert {p.suffix for p in cache.iterdir()} == {".arrow"}
    assert len(list(cache.iterdir())) == 8


def test_cache_errors_name_the_file_at_hand(tmp_path, tokenizer, template):
    """A refusal from cached rows names the line, and the file that was asked for."""
    rows = [ROWS[0], ROWS[1] | {"chosen": ""}]
    preferences(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, template, invalid_rows="skip")
    with pytest.raises(DataError, match=r"b.jsonl', line 2: 'chosen' is empty"):
        preferences(write_jsonl(tmp_path / "b.jsonl", rows), tokenizer, template)


def test_damaged_or_unfinished_cache(tmp_path, tokenizer, template, cache, tokenised, monkeypatch):
    data = write_jsonl(tmp_path / "d.jsonl", ROWS)
    first = preferences(data, tokenizer, template)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", b"not Arrow", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        assert preferences(data, tokenizer, template).chosen_ids == first.chosen_ids
        assert path.read_bytes() == whole
    assert len(tokenised) == 4

    path.unlink()
    monkeypatch.setattr(data_module.os, "replace", fail := Failing(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        preferences(data, tokenizer, template)
    assert fail.calls == 1
    assert not list(cache.iterdir())


class Failing:
    def __init__(self, error: Exception):
        self.error, self.calls = error, 0

    def __call__(self, *_):
        self.calls += 1
        raise self.error


def test_without_cache(tmp_path, tokenizer, template, cache, tokenised):
    data = write_jsonl(tmp_path / "d.jsonl", ROWS)
    kept = preferences(data, tokenizer, template, data_cache=False)
    assert kept.chosen_ids == preferences(data, tokenizer, template, data_cache=False).chosen_ids
    assert len(tokenised) == 2
    assert not cache.exists()


def test_cache_folder_that_cannot_be_written(tmp_path, tokenizer, template):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"data_cache: cannot write to '.*rto_fast' .*; set HF_DATASETS_CACHE"):
        preferences(write_jsonl(tmp_path / "d.jsonl", ROWS), tokenizer, template)


def test_worker_processes_change_nothing(tmp_path, tokenizer, template):
    rows = [{"prompt": f"story {i}", "chosen": "yes " * (i % 7 + 1), "rejected": "no"} for i in range(50)]
    rows[33]["rejected"] = 5
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    one, two = (
        preferences(data, tokenizer, template, invalid_rows="skip", data_cache=False, data_workers=n) for n in (1, 2)
    )
    assert one.counts == two.counts == Counts(50, 49, {"not text": 1})
    assert one.rows == two.rows
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert getattr(one, name) == getattr(two, name)


def _rank(rank: int, port: int, good: str, bad: str, cache_folder: str, out: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = cache_folder
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    tokenizer = byte_tokenizer()
    template = load_template("plain", tokenizer)
    done: list[int] = []
    real = data_module._tokenise
    data_module._tokenise = lambda *a: done.append(1) or real(*a)
    pairs = preferences(good, tokenizer, template)
    try:
        preferences(bad, tokenizer, template)
        error = "none"
    except DataError as e:
        error = str(e)
    out.put((rank, list(pairs.chosen_ids), len(done), error))
    dist.destroy_process_group()


def test_two_ranks(tmp_path, tokenizer, template, monkeypatch):
    """The first rank tokenises, the second reads what it wrote; an error of the first is raised by both."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    good = write_jsonl(tmp_path / "d.jsonl", ROWS)
    bad = bad_file(tmp_path, "bad.jsonl", GOOD + "{broken\n")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's threads and process group
    out = context.Queue()
    folder = str(tmp_path / "cache")
    ranks = [context.Process(target=_rank, args=(r, port, good, bad, folder, out)) for r in range(2)]
    for r in ranks:
        r.start()
    results = sorted(out.get(timeout=180) for _ in ranks)
    for r in ranks:
        r.join(timeout=60)
        assert r.exitcode == 0
    expected = list(preferences(good, tokenizer, template, data_cache=False).chosen_ids)
    assert [r[1] for r in results] == [expected, expected]
    assert [r[2] for r in results] == [2, 0]
    assert results[0][3] == results[1][3]
    assert "bad.jsonl', line 2, column 2: malformed JSON" in results[0][3]


# ---------------------------------------------------------------------------------------------- small parts


def test_token_lists(tmp_path, tokenizer, template):
    ids = preferences(write_jsonl(tmp_path / "d.jsonl", ROWS), tokenizer, template).chosen_ids
    plain = [template.encode_pair(tokenizer, r["prompt"], r["chosen"])[1] for r in ROWS]
    assert isinstance(ids, TokenLists)
    assert list(ids) == plain
    assert ids == plain
    assert ids != plain[:2]
    assert ids[-1] == plain[-1]
    assert isinstance(ids[0][0], int)
    assert ids[1:] == plain[1:]
    assert ids.take([2, 0]) == [plain[2], plain[0]]
    assert ids.lengths.tolist() == [len(p) for p in plain]
    with pytest.raises(IndexError):
        ids[3]


def test_counts_print_one_line():
    assert str(Counts(3, 3, {})) == "3 rows, 3 kept"
    assert str(Counts(61_135, 60_000, {"not text": 135, "empty text": 1_000})) == (
        "61,135 rows, 60,000 kept, 1,135 skipped (not text: 135, empty text: 1,000)"
    )
