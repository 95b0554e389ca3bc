"""Servers that are not believed, and what messages say of their URLs; no vLLM is needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
import torch

from rto_fast.config import RTOConfig
from rto_fast.errors import ConfigError, DeviceLost, EngineFailure, OutOfMemory, RolloutError, SyncError
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
    engine.apis = {URL: httpx.Client(base_url=URL, transport=httpx.MockTransport(answer))}
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
        (EngineFailure, lambda: servers._content(httpx.Response(500), URL)),
        (EngineFailure, lambda: servers._content(httpx.Response(404), URL)),
        (RolloutError, lambda: servers._content(httpx.Response(400), URL)),
        (ConfigError, lambda: engine_of(version)._check_settings(URL)),
        (ConfigError, lambda: engine_of(workers(dtype="float16"))._check_settings(URL)),
        (ConfigError, lambda: engine_of(workers(max_model_len=3))._check_settings(URL)),
        (ConfigError, lambda: engine_of(workers(device="cuda"))._check_settings(URL)),
    ]
    for kind, call in calls:
        with pytest.raises(kind, match=r"http://127\.0\.0\.1:9") as caught:
            call()
        assert "secret" not in str(caught.value)


def test_an_adapter_that_vllm_refuses_or_leaves_out_is_said():
    def answers(status: int, taken: dict):
        def answer(request):
            if request.url.path == "/v1/load_lora_adapter":
                return httpx.Response(status, text="expected target modules in q_proj")
            found = 404 if request.url.path == "/v1/unload_lora_adapter" else 200
            return httpx.Response(found, json={"results": [taken]})

        return answer

    whole = {"bytes": 4, "digests": {"a": 1}}
    assert engine_of(answers(200, whole))._load(URL, "/folder") == whole
    with pytest.raises(SyncError, match=r"127.*did not take the adapter: expected target.*; use --lora-push merged"):
        engine_of(answers(500, whole))._load(URL, "/folder")
    with pytest.raises(SyncError, match="a: no layer"):
        engine_of(answers(200, {"error": "a: no layer"}))._load(URL, "/folder")
    with pytest.raises(EngineFailure, match="unload_lora_adapter does not answer"):
        engine_of(refuses)._load(URL, "/folder")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("x:1", r"'x:1' must start with http://, https:// or unix:/"),
        ("http://user:secret@h:1/v?key=secret", r"'http://h:1/v' must end before its query or fragment"),
        ("http://h:1#secret", r"'http://h:1' must end before its query or fragment"),
        ("http://h:1?", r"'http://h:1' must end before its query or fragment"),
        ("http://user:se#cret@h:1", r"'http://\*\*\*' is no URL; in user and password write %40 for @, %23 for #"),
        ("http://h:port", r"'http://h:port' is no URL"),
        ("http://:8000", r"'http://:8000' names no host"),
        ("unix:run/socket", r"'unix:run/socket' must name the socket by its whole path"),
        ("unix:~/socket", r"must name the socket by its whole path"),
        ("unix:/" + "ü" * 54, r"has a path of 109 bytes, a socket's has 107 at most"),
    ],
)
def test_urls_that_no_server_can_be_asked_at(url, message):
    with pytest.raises(ConfigError, match=f"vllm_url: .*{message}") as caught:
        config_of(url).validate()
    assert "secret" not in str(caught.value)
    assert "se#cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://user:s%23cret@h:1", "https://h/prefix/", "http://[fd00::1]:80", "unix:/run/a?b#c", "unix:/" + "x" * 106],
)
def test_urls_that_one_can(url):
    config_of(url).validate()


def test_a_server_that_is_named_twice():
    with pytest.raises(ConfigError, match="vllm_url: one of http://h:1, http://h:1/ comes twice"):
        config_of("http://h:1", "http://h:1/").validate()


def config_of(*urls: str) -> RTOConfig:
    return RTOConfig(
        policy="p", reward_model=("r",), dpo_model="d", data="d", rollout_engine="vllm-serve", vllm_url=urls
    )


# The trainer's own device


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (torch.AcceleratorError("illegal"), DeviceLost, "sending weights to vLLM broke the CUDA context"),
        (torch.OutOfMemoryError("CUDA out of memory."), OutOfMemory, "sending weights .*; lower --micro-tokens: "),
        (RuntimeError("Connection closed by peer"), EngineFailure, "the weights did not reach vLLM: Connection closed"),
    ],
)
def test_a_broadcast_that_breaks(error, kind, message, monkeypatch):
    """A server is started again; the trainer's own broken context, or its own lack of memory, another cannot mend."""

    def send(*_):
        raise error

    engine = engine_of(lambda request: httpx.Response(200, json={"results": [{}]}))
    engine.threads, engine.group = ThreadPoolExecutor(1), None
    engine.pushed, engine.adapter = SimpleNamespace(checked_once=iter), None
    monkeypatch.setattr(servers.stream, "send", send)
    with pytest.raises(kind, match=message):
        engine._transfer(iter(()), 1)


def test_a_lost_device_tells_nobody(monkeypatch):
    """Telling the other ranks takes the device."""

    def lost():
        raise DeviceLost("broke the CUDA context")

    monkeypatch.setattr(servers.distributed, "broadcast_object", lambda item: pytest.fail("the device was used"))
    with pytest.raises(DeviceLost):
        servers._on_first_rank(lost)
