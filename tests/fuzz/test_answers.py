"""Answers of a reward server, whatever they are: scores, or one line that names the server."""

from __future__ import annotations

import gzip
import http.server
import json
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from outcomes import Tally, examples, one_line

from rto_fast.contract import ResponseTexts
from rto_fast.errors import RewardError
from rto_fast.scoring.reward_server import RemoteReward

TEXTS = ResponseTexts(prompts=["a", "b"], responses=["c", "d"], messages=[[], []])

number = st.one_of(
    st.floats(), st.integers(-3, 3), st.integers(), st.booleans(), st.none(), st.text(max_size=3),
    st.sampled_from([10**400, "1", [0.5], {}]),
)  # fmt: skip
rewards = st.one_of(
    st.lists(st.floats(-10, 10), min_size=2, max_size=2), st.lists(number, max_size=4), number, st.lists(number)
)
answer = st.one_of(
    st.fixed_dictionaries({"rewards": rewards}).map(lambda a: json.dumps(a).encode()),
    st.fixed_dictionaries({"rewards": rewards}).map(lambda a: json.dumps(a).encode("utf-16")),
    st.recursive(number, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6).map(
        lambda a: json.dumps(a, default=str).encode()
    ),
    st.integers(1000, 200_000).map(lambda n: b'{"rewards": ' + b"[" * n + b"]" * n + b"}"),
    st.integers(4000, 6000).map(lambda n: b'{"rewards": [1, ' + b"9" * n + b"]}"),
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda t: t.encode(errors="replace")),
)
headers = st.fixed_dictionaries(
    {},
    optional={
        "Content-Type": st.sampled_from(["application/json", "text/html; charset=utf-7", "x/y; charset=nonsense", ""]),
        "Content-Encoding": st.sampled_from(["gzip", "deflate", "br", "zstd", "identity", "nonsense"]),
        "Location": st.sampled_from(["/elsewhere", "http://[", "ftp://x", ""]),
        "Retry-After": st.sampled_from(["0", "never"]),
        "X-Text": st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
    },
)
status = st.one_of(st.just(200), st.just(200), st.sampled_from([201, 204, 301, 400, 404, 429, 500, 503]))


@pytest.fixture(scope="module")
def server():
    """(URL, box): answers every request with box = (status, headers, body, bytes of it that are sent)."""
    box: list = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            code, headers, body, sent = box[0]
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body[:sent])

        def log_message(self, *_):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{web.server_port}/reward", box
    web.shutdown()
    web.server_close()


@given(status=status, headers=headers, body=answer, zipped=st.booleans(), cut=st.one_of(st.none(), st.integers(0, 80)))
@examples(quick=60, full=500)
def score_any(tally, url, box, status, headers, body, zipped, cut):
    body = gzip.compress(body) if zipped and headers.get("Content-Encoding") == "gzip" else body
    box[:] = [(status, headers, body, len(body) if cut is None else cut)]
    try:
        scores = RemoteReward(url, timeout_s=20, attempts=2, wait_s=0.001, max_wait_s=0.001).score(None, TEXTS)
    except RewardError as error:
        one_line(error, about="127.0.0.1")
        tally("refused")
    else:
        stated = json.loads(body if not zipped or headers.get("Content-Encoding") != "gzip" else gzip.decompress(body))
        assert scores.shape == (2,)
        assert torch.equal(scores, torch.tensor(stated["rewards"], dtype=torch.float32)) or scores.isnan().any()
        tally("scored")


def test_answers_are_scores_or_refused(server):
    with Tally().shown("answers") as tally:
        score_any(tally, *server)
        assert tally["scored"] > sum(tally.values()) / 50
