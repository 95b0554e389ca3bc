"""Adapters by Hub id: read from the cache as folders are."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers

from rto_fast.config import ALL_LINEAR, Lora
from rto_fast.data import adapter_folder
from rto_fast.data.adapter_folder import base_of, read_adapter
from rto_fast.data.tokenizer import load_tokenizer
from rto_fast.models.attention import PACKED
from rto_fast.models.load import check_weights, load_config, load_policy
from rto_fast.models.save import export

pytest.importorskip("peft")
LORA, LOADING = Lora(4, 32, 0.0, (ALL_LINEAR,), False, False, 0), {"dtype": torch.float32, "attention": PACKED}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A Hub cache that is asked for everything, and no network."""
    for module in (huggingface_hub.constants, transformers.utils.hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"))
    adapter_folder._fetched.cache_clear()
    yield tmp_path / "hub"
    adapter_folder._fetched.cache_clear()


def put(cache: Path, name: str) -> Path:
    """The folder of a Hub id in the cache."""
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return repo / "snapshots" / ("0" * 40)


def test_an_adapter_of_the_hub_is_one_in_a_folder(tiny, tmp_path, cache):
    model = load_policy(tiny.policy, argument="model", lora=LORA, **LOADING)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    export(model, tmp_path / "local", write=True)
    load_tokenizer(tiny.policy).save_pretrained(tmp_path / "local")
    shutil.copytree(tmp_path / "local", put(cache, "org/adapter"), dirs_exist_ok=True)
    assert base_of("org/adapter") == tiny.policy
    assert load_config("org/adapter", "model").vocab_size == load_config(tiny.policy, "model").vocab_size
    assert load_tokenizer("org/adapter").get_vocab() == load_tokenizer(tiny.policy).get_vocab()
    assert check_weights("org/adapter", "model") == check_weights(str(tmp_path / "local"), "model")
    for lora in (None, LORA):
        loaded = [load_policy(p, argument="model", lora=lora, **LOADING) for p in ("org/adapter", tmp_path / "local")]
        ours, theirs = loaded
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_an_id_that_is_no_adapter_or_not_there_is_left_alone(cache):
    (put(cache, "org/whole") / "config.json").write_text("{}")
    for name in ("org/whole", "org/none", "org/none/deep", "none"):
        assert read_adapter(name, "model") is None
        assert base_of(name) == name
