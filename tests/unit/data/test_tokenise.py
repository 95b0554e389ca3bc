"""Tokenised once: the cache, worker processes, ranks."""

from __future__ import annotations

import multiprocessing

import datasets
import pytest
import torch
import torch.distributed as dist
from data_helpers import GOOD, ROWS, bad_file, preferences, prompts, sft, write_jsonl
from launches import forks, free_port
from test_chat_template import byte_tokenizer

from rto_fast.data import tokenise
from rto_fast.data.chat_template import load_template
from rto_fast.data.load import Counts
from rto_fast.errors import DataError


@pytest.fixture
def tokenised(monkeypatch) -> list[str]:
    """Names of the data sets that were tokenised rather than taken from the cache."""
    done: list[str] = []
    real = tokenise._tokenise

    def count(config, *rest):
        done.append(config.data)
        return real(config, *rest)

    monkeypatch.setattr(tokenise, "_tokenise", count)
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
    monkeypatch.setattr(tokenise.os, "replace", fail := Failing(OSError("disk full")))
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
    real = tokenise._tokenise
    tokenise._tokenise = lambda *a: done.append(1) or real(*a)
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
    context = forks()
    out = context.Queue()
    folder = str(tmp_path / "cache")
    port = free_port()
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


def test_without_a_terminal_one_line_says_what_is_tokenised(tmp_path, tokenizer, template, cache, capsys):
    data = write_jsonl(tmp_path / "d.jsonl", ROWS)
    datasets.disable_progress_bars()
    try:
        preferences(data, tokenizer, template)
    finally:
        datasets.enable_progress_bars()
    assert capsys.readouterr().err == f"tokenising d.jsonl: {len(ROWS)} rows\n"
    preferences(data, tokenizer, template)  # from the cache
    assert capsys.readouterr().err == ""
