"""How servers are asked: on the network or on a socket, past every proxy, with the user and password of the URL."""

from __future__ import annotations

import asyncio
import socketserver
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from rto_fast.rollout.vllm_engines.address import async_client, client, is_near, socket_path

TIMEOUT = httpx.Timeout(10)


class Echo(BaseHTTPRequestHandler):
    """Answers with the path and the credentials that it was asked with."""

    def do_GET(self) -> None:
        body = f"{self.path} {self.headers['Authorization'] or '-'}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class OnSocket(socketserver.ThreadingUnixStreamServer):
    def get_request(self):
        connection, _ = super().get_request()
        return connection, ("", 0)


@pytest.fixture
def serve(monkeypatch):
    """serve(kind) -> the URL of a server of that kind, in an environment whose proxies answer nothing."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        socket = Path(folder) / "socket"
        servers = {"unix": OnSocket(str(socket), Echo), "http": ThreadingHTTPServer(("127.0.0.1", 0), Echo)}
        for server in servers.values():
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        place = f"127.0.0.1:{servers['http'].server_address[1]}"
        urls = {"unix": f"unix:{socket}", "http": f"http://{place}", "user": f"http://user:s%40cret@{place}"}
        yield urls.__getitem__
        for server in servers.values():
            server.shutdown()
            server.server_close()


async def asked(url: str, path: str) -> str:
    async with async_client(url, TIMEOUT, 2) as server:
        return (await server.get(path)).text


@pytest.mark.parametrize(
    ("kind", "behind", "answer"),
    [
        ("unix", "", "/a/b -"),
        ("http", "", "/a/b -"),
        ("http", "/prefix", "/prefix/a/b -"),
        ("user", "", "/a/b Basic dXNlcjpzQGNyZXQ="),  # user:s@cret
        ("user", "/prefix", "/prefix/a/b Basic dXNlcjpzQGNyZXQ="),
    ],
)
def test_what_a_server_is_asked(serve, kind, behind, answer):
    url = serve(kind) + behind
    with client(url, TIMEOUT) as server:
        assert server.get("/a/b").text == answer
    assert asyncio.run(asked(url, "/a/b")) == answer


@pytest.mark.parametrize(
    ("url", "near"),
    [
        ("unix:/run/socket", True),
        ("http://127.0.0.1:8000", True),
        ("http://user:password@localhost", True),
        ("http://[::1]:8000", True),
        ("http://10.0.0.2:8000", False),
        ("https://node-a", False),
    ],
)
def test_urls_of_one_machine(url, near):
    assert is_near(url) == near


def test_paths_of_sockets():
    assert socket_path("unix:/run/x?a#b") == "/run/x?a#b"
    assert socket_path("http://unix:80/") is None
