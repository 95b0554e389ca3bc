"""Rows and files of every shape: loaded as they stand, or refused with the place."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from outcomes import Tally, examples, one_line

from rto_fast.config import DPOConfig, PreferenceConfig, RTOConfig, SFTConfig
from rto_fast.data.chat_template import load_template
from rto_fast.data.load import load_answers, load_preferences, load_prompts, load_sft
from rto_fast.demo.tiny_task import make_task
from rto_fast.errors import DataError

LIMIT = 64
COLUMNS = (
    "prompt", "chosen", "rejected", "response", "completion", "label", "messages", "instruction", "input", "system",
    "context_messages", "tools", "score_chosen", "extra",
)  # fmt: skip

text = st.one_of(
    st.sampled_from(
        ["", " ", "once there was a fox .", "the fox ran .", "\x00", "\u202eabc", "\ufeff", "\ud800", "[]",
         '[{"a": 1}]', "null", "1" * 400, "a\r\nb", '"', "<|im_end|>", "{{ 1 }}", "{% for x in y %}"]
    ),
    st.text(max_size=30),
)  # fmt: skip
role = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "", None, 3])
message = st.fixed_dictionaries(
    {},
    optional={
        "role": role,
        "content": st.one_of(
            text, st.none(), st.lists(st.fixed_dictionaries({"type": text, "text": text}), max_size=2)
        ),
        "tool_calls": st.one_of(st.none(), st.just([]), st.lists(st.fixed_dictionaries({"name": text}), max_size=2)),
        "reasoning_content": text,
        "weight": st.integers(),
    },
)
number = st.one_of(st.booleans(), st.integers(-2, 2), st.integers(), st.floats(), st.none())
value = st.one_of(text, st.lists(message, max_size=4), number, st.lists(text, max_size=2), message)
good = st.fixed_dictionaries(
    {"prompt": st.just("once there was a fox ."), "chosen": st.just("the fox ran ."), "rejected": st.just("a fox .")},
    optional={"response": st.just("the fox ran ."), "completion": st.just("a fox ."), "label": st.booleans()},
)
odd = st.dictionaries(st.sampled_from(COLUMNS), value, max_size=5)
row = st.one_of(good, good, good, odd, st.tuples(good, odd).map(lambda both: {**both[0], **both[1]}))
rows = st.one_of(st.lists(row, min_size=1, max_size=5), st.lists(st.one_of(row, value), max_size=5))
damage = st.one_of(
    st.none(), st.none(),
    st.tuples(st.just("cut"), st.integers(0, 400), st.just(b"")),
    st.tuples(st.just("put"), st.integers(0, 400), st.binary(min_size=1, max_size=4)),
)  # fmt: skip
kinds = st.sampled_from([".jsonl", ".jsonl", ".json", ".csv", ".parquet"])


def jsonl(rows: list) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def csv_bytes(rows: list) -> bytes:
    rows = [r for r in rows if isinstance(r, dict)]
    names = list(dict.fromkeys(name for r in rows for name in r))
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(names)
    for r in rows:
        cells = [r.get(n, "") for n in names]
        writer.writerow([c if isinstance(c, str) else json.dumps(c) for c in cells])
    return out.getvalue().encode(errors="surrogatepass")


def parquet_bytes(rows: list) -> bytes:
    """Only what Arrow can hold; what it cannot is left out, column by column."""
    rows = [r for r in rows if isinstance(r, dict)]
    names = list(dict.fromkeys(name for r in rows for name in r))
    columns = {}
    for name in names:
        with contextlib.suppress(pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError):
            columns[name] = pa.array([r.get(name) for r in rows])
    out = io.BytesIO()
    with contextlib.suppress(pa.ArrowException):  # a struct without fields cannot be written
        pq.write_table(pa.table(columns), out)
    return out.getvalue()


def written(folder: str, kind: str, rows: list, harm) -> str:
    make = {".jsonl": jsonl, ".json": lambda r: json.dumps(r).encode(), ".csv": csv_bytes, ".parquet": parquet_bytes}
    data = make[kind](rows)
    if harm:
        _, at, put = harm
        data = data[: at % (len(data) + 1)] + (put + data[at % (len(data) + 1) :] if put else b"")
    path = Path(folder) / f"rows{kind}"
    path.write_bytes(data)
    return str(path)


@pytest.fixture(scope="module")
def task():
    tokenizer = make_task(100, "easy").tokenizer
    return tokenizer, load_template("auto", tokenizer)


LOADERS = {
    "prompts": lambda data, **s: (load_prompts, RTOConfig(data=data, policy="m", max_prompt_length=LIMIT, **s)),
    "preferences": lambda data, **s: (load_preferences, PreferenceConfig(data=data, model="m", max_length=LIMIT, **s)),
    "answers": lambda data, **s: (load_answers, DPOConfig(data=data, model="m", max_length=LIMIT, **s)),
    "sft": lambda data, **s: (load_sft, SFTConfig(data=data, model="m", max_length=LIMIT, **s)),
}


def check_ids(loaded, vocabulary: int) -> None:
    """Kept rows can be trained on: token ids of the vocabulary, prompt + response within the limit."""
    for part in loaded if isinstance(loaded, tuple) else (loaded,):
        lists = [getattr(part, n) for n in ("chosen_ids", "rejected_ids", "response_ids") if hasattr(part, n)]
        for i, prompt in enumerate(part.prompt_ids):
            assert prompt
            responses = [ids[i] for ids in lists]
            assert len(prompt) + max(map(len, responses), default=0) <= LIMIT
            assert not responses or any(responses)
            assert all(0 <= t < vocabulary for ids in (prompt, *responses) for t in ids)


@given(
    stage=st.sampled_from(list(LOADERS)), kind=kinds, rows=rows, harm=damage,
    invalid=st.sampled_from(["refuse", "skip"]), overlong=st.sampled_from(["refuse", "skip", "truncate"]),
)  # fmt: skip
@examples(quick=150, full=1000)
def load_any(tally, task, stage, kind, rows, harm, invalid, overlong):
    tokenizer, template = task
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", os.path.join(folder, "cache"))
        path = written(folder, kind, rows, harm)
        settings = {"invalid_rows": invalid, "overlong": overlong, "data_workers": 1}
        load, config = LOADERS[stage](path, **settings)
        ends = []
        for _ in range(2):  # the second time from the cache, where the first left one
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    loaded = load(config, tokenizer, template)
            except DataError as error:
                ends.append(one_line(error, about="data: "))
            else:
                check_ids(loaded, len(tokenizer))
                ends.append([list(p.prompt_ids) for p in (loaded if isinstance(loaded, tuple) else (loaded,))])
        assert ends[0] == ends[1]
        tally("refused" if isinstance(ends[0], str) else "loaded")


def test_rows_are_loaded_or_refused(task):
    datasets.disable_progress_bars()
    with Tally().shown("rows") as tally:
        load_any(tally, task)
        assert tally["loaded"] > sum(tally.values()) / 10  # else nothing but refusals was tried
