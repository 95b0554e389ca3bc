"""Reward servers: what they are sent and asked again, what their answers may be, and how they are reached."""

from __future__ import annotations

import asyncio
import gzip
import math
import time
import tracemalloc
import zlib

import httpx
import pytest
import torch
from reward_helpers import WORDS, Server, case, columns_of

from rto_fast.build import load_reward_sources
from rto_fast.config import RTOConfig
from rto_fast.contract import ResponseTexts
from rto_fast.errors import ConfigError, RewardError
from rto_fast.scoring.reward_server import RemoteReward, proxy_of


def remote(server: Server, **settings) -> RemoteReward:
    return RemoteReward(server.url, **({"wait_s": 0.01, "timeout_s": 5.0, "attempts": 3} | settings))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_remote_scores_in_order_and_in_chunks(server, chunk):
    score = remote(server, chunk=chunk).score(*case())
    assert score.dtype == torch.float32
    assert score.tolist() == [len(w) for w in WORDS]
    assert len(server.bodies) == math.ceil(len(WORDS) / chunk)
    assert sorted(q for b in server.bodies for q in b["query"]) == [f"p{i}:{w}" for i, w in enumerate(WORDS)]
    assert sorted(p for b in server.bodies for p in b["prompts"]) == [f"p{i}:" for i in range(len(WORDS))]


def test_remote_scores_inside_a_notebook(server):
    """Where a loop runs in this thread already."""

    async def cell() -> torch.Tensor:
        return remote(server).score(*case())

    assert asyncio.run(cell()).equal(remote(server).score(*case()))


def test_remote_keeps_several_requests_in_flight(server):
    server.always = 0.1
    remote(server, chunk=1, in_flight=3).score(*case())
    assert server.most_busy == 3


def test_remote_with_no_responses(server):
    assert remote(server).score(*case([])).shape == (0,)


@pytest.mark.parametrize("fault", [500, 503, 429, "hang up", 0.6])
def test_remote_tries_again(server, fault):
    server.script = [fault, fault]
    score = remote(server, timeout_s=0.3).score(*case())
    assert score.tolist() == [len(w) for w in WORDS]
    assert len(server.bodies) == 3


def test_remote_waits_longer_each_time(server):
    server.always = 500
    start = time.perf_counter()
    with pytest.raises(RewardError):
        remote(server, attempts=4, wait_s=0.05).score(*case())
    assert 0.35 <= time.perf_counter() - start < 3  # .05 + .1 + .2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (503, r"http://127\.0\.0\.1:\d+/score: status 503 after 3 attempt\(s\): 'the model is loading'"),
        (0.6, r"/score: no answer after 3 attempt\(s\) \(time-out 0\.3 s\): TimeoutError"),
        ("hang up", r"/score: no answer after 3 attempt\(s\)"),
    ],
)
def test_remote_gives_up_after_the_last_attempt(server, fault, message):
    server.always = fault
    with pytest.raises(RewardError, match=message):
        remote(server, timeout_s=0.3).score(*case())
    assert len(server.bodies) == 3


def test_remote_where_nobody_listens(server):
    source = remote(server, attempts=2)
    server.http.server_close()
    with pytest.raises(RewardError, match=r"no answer after 2 attempt\(s\).*ConnectError"):
        source.score(*case())


@pytest.mark.parametrize("status", [400, 404, 302])
def test_remote_refusal_is_not_tried_again(server, status):
    server.always = status
    with pytest.raises(RewardError, match=rf"status {status} after 1 attempt\(s\)"):
        remote(server).score(*case())
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>", r"answer is not \{\"rewards\": \[...\]\}: '<html>'"),
        (b"\xff\xfe", "answer is not"),
        (b'{"rewards": [' + b"1" * 5000 + b"]}", r"answer is not .*1111'"),
        (b'{"rewards": [' + b"1" * 400 + b", 1, 1, 1, 1, 1, 1]}", "a reward is beyond every float"),
        (b'{"rewards": ' + b"[" * 200_000, "answer is not"),
        ([1.0] * 7, "answer is not"),
        ({"scores": [1.0] * 7}, "answer is not"),
        ({"rewards": 1.0}, r"no flat list of numbers: .*1\.0"),
        ({"rewards": [[1.0]] * 7}, "no flat list of numbers"),
        ({"rewards": [1.0] * 6 + [None]}, "no flat list of numbers"),
        ({"rewards": [1.0] * 6 + ["2"]}, "no flat list of numbers"),
        ({"rewards": [1.0] * 6}, "6 rewards for 7 responses"),
    ],
)
def test_remote_with_a_wrong_answer(server, answer, message):
    server.always = answer
    with pytest.raises(RewardError, match=message):
        remote(server).score(*case())
    assert len(server.bodies) == 1


def test_remote_passes_nan_on(server):
    server.always = {"rewards": [float("nan")] + [1.0] * 6}
    assert torch.isnan(remote(server).score(*case())).tolist() == [True] + [False] * 6


@pytest.mark.parametrize("where", ["head", "body"])
def test_remote_deadline_bounds_an_attempt_that_drips(server, where):
    server.drip = where
    start = time.perf_counter()
    with pytest.raises(RewardError, match=r"no answer after 2 attempt\(s\) \(time-out 0\.3 s\): TimeoutError"):
        remote(server, attempts=2, timeout_s=0.3).score(*case())
    assert 0.6 <= time.perf_counter() - start < 2


def test_remote_answer_has_a_size_limit_after_unpacking(server):
    server.headers["Content-Encoding"] = "gzip"
    packed = zlib.compressobj(wbits=31)
    server.always = b"".join([*(packed.compress(bytes(1 << 20)) for _ in range(300)), packed.flush()])
    assert len(server.always) < 1 << 20
    tracemalloc.start()
    with pytest.raises(RewardError, match=r"the answer has more than 4,194,304 bytes"):
        remote(server).score(*case())
    assert tracemalloc.get_traced_memory()[1] < 150 << 20
    tracemalloc.stop()
    assert len(server.bodies) == 1
    server.always = gzip.compress(b'{"rewards": [0, 1, 2, 3, 4, 5, 6]}')
    assert remote(server).score(*case()).tolist() == [0, 1, 2, 3, 4, 5, 6]
    server.headers["Content-Encoding"] = "gzip, gzip"
    with pytest.raises(RewardError, match=r"Content-Encoding 'gzip, gzip' was not asked for"):
        remote(server).score(*case())


def test_remote_messages_hold_no_password(server, caplog):
    url = server.url.replace("http://", "http://user:first-secret@") + "?key=second-secret"
    server.always = b"wrong: key=second-secret, user:first-secret, second-secret"
    source = RemoteReward(url, attempts=1, timeout_s=5.0)
    with caplog.at_level("INFO"), pytest.raises(RewardError, match=r"wrong: \*\*\*, user:\*\*\*, \*\*\*") as error:
        source.score(*case())
    assert "secret" not in str(error.value) + caplog.text
    assert error.value.__cause__ is None
    with pytest.raises(ConfigError) as refused:
        RemoteReward("ftp://user:secret@host/x?secret")
    assert "secret" not in str(refused.value)


PROXY = {"http": "http://proxy:1", "all": "socks5://proxy:2"}


@pytest.mark.parametrize(
    ("url", "no", "proxy"),
    [
        ("http://8.8.8.8/x", "", "http://proxy:1"),
        ("https://8.8.8.8/x", "", "socks5://proxy:2"),
        ("http://127.0.0.1:5/x", "", ""),
        ("http://localhost:5/x", "", ""),
        ("http://rm.localhost/x", "", ""),
        ("http://[::1]:5/x", "", ""),
        ("http://10.1.2.3/x", "", ""),
        ("http://192.168.0.9/x", "", ""),
        ("http://[fd00::9]/x", "", ""),
        ("http://8.8.8.8/x", "8.8.0.0/16", ""),
        ("http://[2600::9]/x", "example.org, 2600::/16", ""),
        ("http://[2600::9]/x", "2601::/16,::1", "http://proxy:1"),
        ("http://8.8.8.8/x", "*", ""),
        ("http://rm.example.invalid/x", ".example.invalid", ""),
        ("http://rm.example.invalid/x", "other.invalid", "http://proxy:1"),
    ],
)
def test_which_proxy_a_server_is_asked_through(url, no, proxy):
    assert proxy_of(httpx.URL(url), PROXY | {"no": no}) == proxy


def test_a_proxy_of_the_environment_does_not_capture_this_machine(server, monkeypatch):
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert remote(server).score(*case()).tolist() == [len(w) for w in WORDS]


@pytest.mark.parametrize("proxy", ["socks5://user:secret@host:1", "ftp://host:1"])
def test_a_proxy_that_cannot_be_used_is_refused_before_the_run(monkeypatch, proxy):
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, proxy)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "example.org,fd00::/8")
    with pytest.raises(
        ConfigError, match=r"reward_url: http://8\.8\.8\.8/x cannot be asked through the proxy"
    ) as refused:
        RemoteReward("http://8.8.8.8/x")
    assert "secret" not in str(refused.value)


def test_remote_name_holds_no_password():
    assert RemoteReward("http://user:secret@host:81/rm?key=k").name == "http://host:81/rm"


@pytest.mark.parametrize("column", ["labels", "label"])
def test_labels_go_to_a_server_as_openrlhf_sends_them(server, column):
    columns = columns_of({"prompt": "a", column: "x"}, {"prompt": "b", column: "y"})
    (source,) = load_reward_sources(RTOConfig(reward_url=(server.url,)), columns)
    texts = ResponseTexts(["p", "q"], ["", "r"], [[], []], columns=columns.of([1, 0]))
    assert source.score_texts(texts).tolist() == [0, 1]
    assert server.bodies == [{"query": ["p", "qr"], "prompts": ["p", "q"], "labels": ["y", "x"]}]


@pytest.mark.parametrize("label", [float("nan"), {1, 2}, "\ud800"])
def test_a_label_that_is_no_json(server, label):
    source = RemoteReward(server.url, labels="label")
    with pytest.raises(RewardError, match=r"column 'label' holds .*, which is no JSON"):
        source.score_texts(ResponseTexts(["p"], ["r"], [[]], columns={"label": [label]}))
    assert not server.bodies


@pytest.mark.parametrize("url", ["", "localhost:5000/x", "ftp://host/x", "http://", "http://h:port/"])
def test_urls_that_are_none(url):
    with pytest.raises(ConfigError, match="reward_url"):
        load_reward_sources(RTOConfig(reward_url=(url,)), columns_of())


def test_a_password_that_breaks_its_url_is_not_shown():
    """httpx takes what stands before the # for the port, and says so."""
    with pytest.raises(ConfigError, match=r"reward_url: 'http://\*\*\*' is no URL; .* write .* %23 for #") as refused:
        load_reward_sources(RTOConfig(reward_url=("http://user:sec#ret@host/rm",)), columns_of())
    assert "sec" not in str(refused.value)
