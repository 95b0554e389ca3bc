"""Models that vLLM can sample from, and engines that are closed."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import CPU, HEADS
from loop_helpers import make_tiny_models

from rto_fast.rollout.vllm_engines.colocated import VLLMEngine


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make_tiny_models(tmp_path_factory.mktemp("tied"), tied=True, **HEADS)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return make_tiny_models(tmp_path_factory.mktemp("untied"), **HEADS)


@pytest.fixture(params=["tied", "untied"])
def models(request, tied, untied):
    return tied if request.param == "tied" else untied


@pytest.fixture
def make(one_rank):
    """make(path, dtype, max_sequences) -> engine, closed at the end."""
    made = []

    def engine(path, dtype=torch.float32, max_sequences=64):
        made.append(VLLMEngine(path, CPU, dtype, max_length=64, max_sequences=max_sequences))
        return made[-1]

    yield engine
    for one in made:
        one.close()
