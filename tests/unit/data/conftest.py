"""A tokenizer, its templates, and a cache folder a test."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from test_chat_template import CHATML, byte_tokenizer

from rto_fast.data.chat_template import load_template


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
