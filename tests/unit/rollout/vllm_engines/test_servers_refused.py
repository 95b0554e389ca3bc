"""Servers that are not believed, and what messages say of their URLs; no vLLM is needed."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
import pytest
import torch

from rto_fast.errors import ConfigError, EngineFailure, RolloutError
from rto_fast.rollout.vllm_engines import servers
from rto_fast.rollout.vllm_engines.servers import VLLMServeEngine

URL = "http://user:secret@127.0.0.1:9"
FITS = {"dtype": "float32", "logprobs_mode": "processed_logprobs", "vocab_size": 8, "max_model_len": 4, "device": "cpu"}


def engine_of(answer, *, ended: int | None = None) -> VLLMServeEngine:
    """An engine whose servers answer as `answer(request)` does; ended: its own server's exit code."""
    engine = object.__new__(VLLMServeEngine)
    engine.urls, engine.start_timeout_s, engine.dtype, engine.device = [URL], 0.0, torch.float32, torch.device("cpu")
    engine.vocab_size, engine.max_positions = 8, 4
    process = SimpleNamespace(poll=lambda: ended)
    engine.servers = [SimpleNamespace(process=process, log_tail=lambda: "\n  its log")]
    engine.api = httpx.Client(transport=httpx.MockTransport(answer))
    return engine


def test_an_answer_while_the_own_server_is_dead_is_not_believed():
    healthy = lambda request: httpx.Response(200)  # noqa: E731
    engine_of(healthy)._await_health()
    with pytest.raises(EngineFailure, match=r"(?s)vLLM ended while it started.*its log"):
        engine_of(healthy, ended=1)._await_health()


def refuses(request):
    raise httpx.ConnectError("no one there")


def workers(**change):
    def answer(request):
        results = [FITS | change]
        return httpx.Response(200, json={"version": "0.32.0"} if request.method == "GET" else {"results": results})

    return answer


def test_messages_hold_no_credentials():
    def version(request):
        return httpx.Response(200, json={"version": "0.1"} if request.method == "GET" else {})

    calls = [
        (EngineFailure, lambda: engine_of(refuses)._await_health()),
        (EngineFailure, lambda: engine_of(refuses)._post(URL, "/x")),
        (EngineFailure, lambda: servers._content(httpx.Response(500, request=httpx.Request("GET", URL)))),
        (EngineFailure, lambda: servers._content(httpx.Response(404, request=httpx.Request("GET", URL)))),
        (RolloutError, lambda: servers._content(httpx.Response(400, request=httpx.Request("GET", URL)))),
        (ConfigError, lambda: engine_of(version)._check_settings(URL)),
        (ConfigError, lambda: engine_of(workers(dtype="float16"))._check_settings(URL)),
        (ConfigError, lambda: engine_of(workers(max_model_len=3))._check_settings(URL)),
        (ConfigError, lambda: engine_of(workers(device="cuda"))._check_settings(URL)),
    ]
    for kind, call in calls:
        with pytest.raises(kind, match=r"http://127\.0\.0\.1:9") as caught:
            call()
        assert "secret" not in str(caught.value)
