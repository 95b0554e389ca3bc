"""Data sets with several configurations, one of which is named behind a colon; copies of repositories, offline."""

from __future__ import annotations

import json

import datasets
import pytest
from data_helpers import Hub, write_jsonl

from rto_fast.config import RTOConfig, SFTConfig
from rto_fast.data.columns import DataColumns
from rto_fast.data.load import load_prompts, load_sft
from rto_fast.data.sources import has_splits, open_source
from rto_fast.errors import DataError

PROBLEM = {"question": "Tom has 40 eggs and buys 2 more. How many?", "answer": "40 + 2 = <<40+2=42>>42\n#### 42"}


def repository(folder, configurations=("main", "socratic")):
    """A copy of a repository like GSM8K's: its configurations have the splits train and test, of files of their own."""
    folder.mkdir()
    listed = []
    for name in configurations:
        files = []
        for split, count in (("train", 3), ("test", 2)):
            rows = [PROBLEM | {"question": f"{name} {split} {i}: {PROBLEM['question']}"} for i in range(count)]
            write_jsonl(folder / f"{name}-{split}.jsonl", rows)
            files.append({"split": split, "path": f"{name}-{split}.jsonl"})
        listed.append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(listed)}\n---\n\n# Problems\n")
    return str(folder)


@pytest.fixture(autouse=True)
def cache_of_the_test(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def questions(name, split):
    return [row["question"].partition(":")[0] for row in open_source("data", name, split)[1](0).rows]


def test_the_configuration_and_its_splits(tmp_path):
    folder = repository(tmp_path / "gsm8k")
    assert questions(f"{folder}:main", "train") == [f"main train {i}" for i in range(3)]
    assert questions(f"{folder}:socratic", "test") == [f"socratic test {i}" for i in range(2)]
    assert has_splits(f"{folder}:main")
    assert questions(repository(tmp_path / "one", ["only"]), "test") == ["only test 0", "only test 1"]


def test_configurations_have_fingerprints_of_their_own(tmp_path):
    folder = repository(tmp_path / "gsm8k")
    first, again, other = (open_source("data", f"{folder}:{c}", "train")[0] for c in ("main", "main", "socratic"))
    assert first == again != other


@pytest.mark.parametrize(
    ("suffix", "split", "message"),
    [
        ("", "train", "data: '{0}' has several configurations: it has main, socratic; name one as {0}:main"),
        (":main2", "train", "data: '{0}' has no configuration 'main2': it has main, socratic; name one as {0}:main"),
        (":main", "dev", "data: '{0}:main' gave no data set of this name with split 'dev': .*dev"),
    ],
)
def test_what_is_refused_says_what_there_is(tmp_path, suffix, split, message):
    folder = repository(tmp_path / "gsm8k")
    with pytest.raises(DataError, match=f"^{message.format(folder)}"):
        open_source("data", folder + suffix, split)


def test_files_and_saved_folders_have_no_configuration(tmp_path):
    file, saved = write_jsonl(tmp_path / "d.jsonl", [PROBLEM]), str(tmp_path / "saved")
    datasets.Dataset.from_list([PROBLEM]).save_to_disk(saved)
    with pytest.raises(DataError, match=f"^data: '{file}' is a file, which has no configuration 'main'"):
        open_source("data", f"{file}:main", "train")
    with pytest.raises(
        DataError, match=f"^data: folder '{saved}' has no README.md that names configurations like 'mai"
    ):
        open_source("data", f"{saved}:main", "train")
    (tmp_path / "saved" / "README.md").write_text("# Saved, and described\n")
    assert len(open_source("data", saved, "train")[1](0).rows) == 1
    colon = write_jsonl(tmp_path / "a:b.jsonl", [PROBLEM])
    assert len(open_source("data", colon, "train")[1](0).rows) == 1


def test_the_hub_is_asked_for_the_configuration(monkeypatch):
    asked = []

    def load_dataset(path, *, split, **settings):
        asked.append((path, split, settings))
        return datasets.Dataset.from_list([PROBLEM])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    open_source("data", "openai/gsm8k:main", "test")
    open_source("data", "openai/gsm8k", "test")
    assert asked == [("openai/gsm8k", "test", {"name": "main"}), ("openai/gsm8k", "test", {})]


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", Hub({}, datasets.load_dataset))
    with pytest.raises(DataError, match=r"^data: 'owner/set' is no local file or folder, and the Hub gave no"):
        open_source("data", "owner/set", "train")


def test_prompts_answers_and_the_held_out_split(tmp_path, tokenizer, template):
    """GSM8K's columns as `rto-fast rlvr` reads them, and a configuration's own test split to evaluate on."""
    folder = repository(tmp_path / "gsm8k")
    config = RTOConfig(data=f"{folder}:main", prompt_key="question", max_prompt_length=500, data_cache=False)
    found = load_prompts(config, tokenizer, template)
    assert [text.count("main train") for text in found.texts] == [1, 1, 1]
    columns = DataColumns.of_prompts(config)
    columns.want(["answer"])
    assert columns.of([2]) == {"answer": [PROBLEM["answer"]]}
    settings = SFTConfig(model="m", data=f"{folder}:main", prompt_key="question", response_key="answer",
                         eval_split="test", max_length=900, data_cache=False)  # fmt: skip
    train, held_out = load_sft(settings, tokenizer, template)
    assert (len(train), len(held_out)) == (3, 2)
