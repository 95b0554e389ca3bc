"""Adapters in the LoRA of vLLM servers: the tests of a colocated vLLM, a lag, and servers that have no LoRA."""

from __future__ import annotations

import re

import pytest
import torch
from engine_helpers import CPU, ROUNDING, rows
from loop_helpers import small_run
from test_vllm_adapters import (
    ADAPTED,
    adapted,
    adapter_bytes,
    answers,
    test_a_push_that_is_not_the_adapter_is_refused,  # noqa: F401
    test_each_push_moves_the_log_probs_and_the_old_one_brings_them_back,  # noqa: F401
    tiny,  # noqa: F401
)

from rto_fast import trainer
from rto_fast.config import RTOConfig
from rto_fast.models.adapters import form_of
from rto_fast.models.save import whole_weights
from rto_fast.rollout.vllm_engines.servers import VLLMServeEngine
from rto_fast.rollout.vllm_engines.support import installed

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not installed(), reason="vLLM is not installed (make install-vllm)"),
]


def served(path: str, form, **more) -> VLLMServeEngine:
    return VLLMServeEngine(path, CPU, torch.float32, max_length=64, max_sequences=64, adapter=form, **more)


@pytest.fixture(scope="module")
def engine(tiny, tmp_path_factory, one_rank):  # noqa: F811
    """A server for adapters."""
    made = served(tiny.policy, form_of(adapted(tiny.policy)), folder=tmp_path_factory.mktemp("served"))
    yield made
    made.close()


def test_a_lag_of_one_samples_by_the_adapter_before(tiny, tmp_path, one_rank):  # noqa: F811
    seen = []
    settings = ADAPTED | {"rollout_engine": "vllm-serve", "rollout_lag": 1, "iterations": 4}
    trainer.train(RTOConfig(**small_run(tiny, tmp_path, **settings)), lambda rollout, texts: seen.append(rollout) or {})
    log = rows(tmp_path)
    assert [r.version for r in seen] == [0, 0, 1, 2]
    assert log[0]["sampler/logp_diff_max"] < ROUNDING
    assert all(row["sampler/logp_diff_mean"] > 1e-3 for row in log[1:])
    assert {row["sync/bytes"] for row in log} == {adapter_bytes(tmp_path)}


def test_servers_without_lora_get_whole_weights(tiny, tmp_path, one_rank):  # noqa: F811
    plain = served(tiny.policy, None, folder=tmp_path)
    model = adapted(tiny.policy)
    joined = served(tiny.policy, form_of(model), urls=plain.urls)
    assert not joined.takes_adapter
    why = joined.merged_because
    assert re.search(r"unix:.* takes none of rank 8: start it with --enable-lora --max-lora-rank 8", why)
    joined.push(whole_weights(model), 1)
    assert answers(joined).version == 1
    plain.close()
