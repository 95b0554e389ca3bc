"""Reward servers for tests: one fails, hangs and lies as it is told, one answers for each token."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets

from rto_fast.contract import Request, ResponseTexts, Rollout
from rto_fast.data.columns import DataColumns
from rto_fast.data.sources import Table


def columns_of(*rows: dict) -> DataColumns:
    """The columns of made-up rows; of none by default."""
    names = list(rows[0]) if rows else []
    return DataColumns(lambda: Table("data", "made up", datasets.Dataset.from_list(list(rows)), names, False, False))


WORDS = ["a", "bb", "", "dddd", "eeeee", "ff", "g"]


def case(responses: list[str] = WORDS) -> tuple[Rollout, ResponseTexts]:
    """A rollout of such texts, and the texts."""
    requests = [Request((1, 2), i, i, 0, i) for i in range(len(responses))]
    ids = [[3] * len(r) for r in responses]
    rollout = Rollout.from_lists(requests, ids, [[0.0] * len(r) for r in ids], [False] * len(ids), 0)
    prompts = [f"p{i}:" for i in range(len(responses))]
    return rollout, ResponseTexts(prompts, responses, [[{"role": "user", "content": p}] for p in prompts])


class Server:
    """A reward model on 127.0.0.1 whose score is the response's length; `script` says what comes before that."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.script: list[object] = []
        """For each request in turn: a status, seconds of silence, bytes or JSON to answer; then all goes well."""
        self.always: object = None
        self.headers: dict[str, str] = {}
        self.drip = ""
        """"head" or "body": what is sent a byte every .05 s, without an end."""
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/score"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self.lock:
            self.bodies.append(body)
            step = self.script.pop(0) if self.script else self.always
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        status, lens = 200, [len(q) - len(p) for q, p in zip(body["query"], body["prompts"], strict=True)]
        payload = json.dumps({"rewards": lens}).encode()
        if isinstance(step, int):
            status, payload = step, b"the model is loading"
        elif isinstance(step, float):
            time.sleep(step)
        elif isinstance(step, bytes):
            payload = step
        elif step == "hang up":
            request.connection.close()
            return
        elif step is not None:
            payload = json.dumps(step).encode()
        with self.lock:
            self.busy -= 1
        try:
            if self.drip:
                return self._drip(request)
            request.send_response(status)
            request.send_header("Content-Length", str(len(payload)))
            for name, value in self.headers.items():
                request.send_header(name, value)
            request.end_headers()
            request.wfile.write(payload)
        except OSError:
            pass  # the client gave up waiting

    def _drip(self, request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(
            b"HTTP/1.1 200 OK\r\n" + (b"Content-Length: 9999\r\n\r\n" if self.drip == "body" else b"X: ")
        )
        for _ in range(100):
            time.sleep(0.05)
            request.wfile.write(b" " if self.drip == "body" else b"x")


class TokenServerDouble:
    """An HTTP server on loopback whose answers a function of the request makes."""

    def __init__(self, answer: Callable[[dict], object]) -> None:
        bodies: list[dict] = []
        self.bodies = bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                content = json.dumps(answer(bodies[-1])).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/tokens"


@contextmanager
def token_server(answer: Callable[[dict], object]) -> Iterator[TokenServerDouble]:
    """A server of token rewards, ended behind the block."""
    server = TokenServerDouble(answer)
    threading.Thread(target=server.http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
