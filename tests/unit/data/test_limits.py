"""Rows that are too long, and rows held out for evaluation."""

from __future__ import annotations

import datasets
import pytest
from data_helpers import GOOD, ROWS, bad_file, preferences, prompts, sft, write_jsonl

from rto_fast.config import PreferenceConfig, SFTConfig
from rto_fast.data.load import Counts, load_preferences, load_sft
from rto_fast.errors import DataError


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
