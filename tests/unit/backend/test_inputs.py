"""A resumed run reads what the run before it read: contents, not names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from loop_helpers import small_run
from safetensors.torch import load_file, save_file

from rto_fast import trainer
from rto_fast.backend import inputs
from rto_fast.config import RTOConfig, SFTConfig
from rto_fast.errors import ConfigError
from rto_fast.logs import files
from rto_fast.supervised.sft import train_sft

pytestmark = pytest.mark.usefixtures("one_rank")


def move_one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 0.25
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_row(path: Path) -> None:
    text = path.read_text()
    path.write_text(text[:-6] + ("x" if text[-6] != "x" else "y") + text[-5:])


def cut(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:40]))


@pytest.fixture
def copies(tiny, tmp_path):
    """Every input of a run, free to be changed."""
    for name in ("policy", "dpo", "reward"):
        shutil.copytree(getattr(tiny, name), tmp_path / name)
    for name in ("prompts", "texts"):
        shutil.copy(getattr(tiny, name), tmp_path / f"{name}.jsonl")
    return tmp_path


def test_rto_refuses_other_inputs_and_takes_the_same(tiny, copies):
    out = copies / "out"
    settings = small_run(tiny, out, policy=str(copies / "policy"), dpo_model=str(copies / "dpo"), report=False,
                         reward_model=(str(copies / "reward"),), data=str(copies / "prompts.jsonl"))  # fmt: skip
    trainer.train(RTOConfig(**settings | {"iterations": 1, "save_every": 1}))
    resumed = RTOConfig(**settings | {"iterations": 1, "save_every": 1, "resume": "auto"})
    for change, path, named in (
        (move_one_weight, "policy", r"policy: '.*policy': model.safetensors has other contents \(\d+ bytes then, \d+"),
        (move_one_weight, "dpo", "dpo_model: '.*dpo': model.safetensors has other contents"),
        (move_one_weight, "reward", "reward_model: '.*reward': model.safetensors has other contents"),
        (edit_row, "prompts.jsonl", r"data: '.*prompts.jsonl': prompts.jsonl has other contents"),
        (cut, "prompts.jsonl", r"data: '.*prompts.jsonl': prompts.jsonl has other contents"),
        (lambda p: (p / "tokenizer_config.json").unlink(), "dpo", "dpo_model: .* tokenizer_config.json is gone"),
        (lambda p: (p / "added.json").write_text("{}"), "dpo", "dpo_model: .* added.json is new"),
    ):
        whole = copies / "whole"
        (shutil.copytree if (copies / path).is_dir() else shutil.copy)(copies / path, whole)
        change(copies / path)
        metrics = (out / "metrics.jsonl").read_text()
        with pytest.raises(ConfigError, match=rf"resume: {named}.* since checkpoint 1 was written; put back"):
            trainer.train(resumed)
        assert (out / "metrics.jsonl").read_text() == metrics
        if (copies / path).is_dir():
            shutil.rmtree(copies / path)
        else:
            (copies / path).unlink()
        whole.rename(copies / path)
    trainer.train(resumed)


REWARD = "def brevity(prompts, responses):\n    return [-float(len(r)) for r in responses]\n"


def test_rto_refuses_other_reward_functions_and_another_template(tiny, copies, monkeypatch):
    """A file, a module and a package by their sources, a template by its file."""
    monkeypatch.chdir(copies)
    monkeypatch.syspath_prepend(str(copies))
    (copies / "here.py").write_text(REWARD)
    (copies / "length_rewards.py").write_text(REWARD)
    (copies / "length_package").mkdir()
    (copies / "length_package" / "__init__.py").write_text("from length_package.inner import brevity\n")
    (copies / "length_package" / "inner.py").write_text(REWARD)
    (copies / "chat.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    settings = small_run(
        tiny, copies / "out", iterations=1, save_every=1, report=False, prompt_key="prompt", reward_model=(),
        reward_fn=("here.py:brevity", "length_rewards:brevity", "length_package:brevity"), chat_template="chat.jinja",
    )  # fmt: skip
    trainer.train(RTOConfig(**settings))
    for path, named in (
        ("here.py", "reward_fn: 'here.py:brevity': here.py"),
        ("length_rewards.py", "reward_fn: 'length_rewards:brevity': length_rewards.py"),
        ("length_package/inner.py", "reward_fn: 'length_package:brevity': inner.py"),
        ("chat.jinja", "chat_template: 'chat.jinja': chat.jinja"),
    ):
        before = (copies / path).read_text()
        (copies / path).write_text(
            before.replace("-float", "2.0 * -float").replace("{{ m.content }} ", "{{ m.content }}")
        )
        with pytest.raises(ConfigError, match=rf"resume: {named} has other contents \(\d+ bytes then, \d+ now\) since"):
            trainer.train(RTOConfig(**settings, resume="auto"))
        (copies / path).write_text(before)
    trainer.train(RTOConfig(**settings, resume="auto"))


def test_a_function_of_python_itself_has_no_file():
    assert inputs.contents_of(RTOConfig(reward_fn=("sys:getsizeof",))) == {"reward_fn: 'sys:getsizeof'": {}}


def test_a_stage_refuses_other_data(copies):
    settings = {"model": str(copies / "policy"), "data": str(copies / "texts.jsonl"), "output_dir": str(copies / "out"),
                "batch": 32, "dtype": "fp32", "max_length": 64, "data_cache": False, "data_workers": 1}  # fmt: skip
    train_sft(SFTConfig(**settings, save_every=1))
    train_sft(SFTConfig(**settings, save_every=1, resume="auto"))
    cut(copies / "texts.jsonl")
    with pytest.raises(ConfigError, match=r"resume: data: '.*texts.jsonl': texts.jsonl has other contents"):
        train_sft(SFTConfig(**settings, save_every=1, resume="auto"))


def test_a_hub_id_has_its_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs.constants, "HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    config = RTOConfig(policy="org/name", data="org/rows")
    (refs / "main").write_text("0123abc")
    before = inputs.contents_of(config)
    assert before == {"policy: 'org/name'": {"revision": "0123abc"}, "data: 'org/rows'": {}}
    (refs / "main").write_text("4567def")
    assert inputs.difference(before, inputs.contents_of(config)) == "policy: 'org/name': revision has other contents"


def test_a_large_file_is_sampled(tmp_path, monkeypatch):
    """Its whole length and pieces all over it; what lies between the pieces may differ."""
    monkeypatch.setattr(files, "WHOLE_BYTES", 2**20)
    monkeypatch.setattr(files, "PIECES", 4)
    path = tmp_path / "weights.safetensors"
    data = bytearray(10 * 2**20)
    path.write_bytes(data)
    first = files.fingerprint(path)
    for place, seen in ((0, True), (2 * 2**20, False), (len(data) - 1, True)):
        data[place] = 1
        path.write_bytes(data)
        assert (files.fingerprint(path) != first) == seen
        data[place] = 0
    path.write_bytes(data[:-1])
    assert files.fingerprint(path) != first
