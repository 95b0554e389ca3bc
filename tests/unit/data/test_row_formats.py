"""Data sets of every source and format -> token ids."""

from __future__ import annotations

import csv
import json

import datasets
import pytest
from data_helpers import ROWS, Hub, as_conversations, preferences, prompts, sft, turn, write_jsonl
from loop_helpers import ROOT
from test_chat_template import STORIES

from rto_fast.config import PreferenceConfig, SFTConfig
from rto_fast.data.chat_template import load_template
from rto_fast.data.load import Counts, load_preferences, load_sft
from rto_fast.data.tokenise import TokenLists
from rto_fast.data.tokenizer import load_tokenizer
from rto_fast.errors import DataError

DATA = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not (DATA.is_dir() and STORIES.is_dir()), reason=f"no {DATA.parent}")


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


def test_csv_values_are_text(tmp_path, tokenizer, template):
    """Numbers, NA and quoted line breaks stand as they are written."""
    (tmp_path / "d.csv").write_text('prompt,response\n1,2.50\nNA,"two\nlines"\n')
    got = sft(str(tmp_path / "d.csv"), tokenizer, template)
    for ids, pair in zip(
        zip(got.prompt_ids, got.response_ids, strict=True), [("1", "2.50"), ("NA", "two\nlines")], strict=True
    ):
        assert ids == template.encode_pair(tokenizer, *pair)


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
