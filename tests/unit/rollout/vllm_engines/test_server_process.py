"""A server that the recipe starts: who reaches it, and what is left of it. A stand-in takes vLLM's place."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch.distributed as dist

from rto_fast.errors import ConfigError
from rto_fast.rollout.vllm_engines import address, server_process
from rto_fast.rollout.vllm_engines.server_process import Server, socket_folder

STAND_IN = """
import argparse, http.server, os, socket, socketserver

class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass

class OnSocket(socketserver.ThreadingUnixStreamServer):
    def get_request(self):
        connection, _ = super().get_request()
        return connection, ("", 0)

def main():
    parser = argparse.ArgumentParser()
    for flag in ("--uds", "--host", "--port"):
        parser.add_argument(flag)
    flags, _ = parser.parse_known_args()
    inner = socket.socket(socket.AF_UNIX)
    inner.bind(os.path.join(os.environ.get("VLLM_RPC_BASE_PATH", "/nowhere"), "0" * 36))  # as between vLLM's processes
    if flags.uds:
        OnSocket(flags.uds, Answers).serve_forever()
    else:
        http.server.HTTPServer((flags.host, int(flags.port)), Answers).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """The folder that holds it, in front of everything else that is imported."""
    module = tmp_path / "site" / "vllm" / "entrypoints" / "launchers" / "api_server" / "entry.py"
    module.parent.mkdir(parents=True)
    module.write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


def started(folder: Path) -> tuple[Server, httpx.Client]:
    """A stand-in that answers, and a client of it."""
    server = Server({"model": "none"}, (), folder / "log")
    client = address.client(server.url, httpx.Timeout(5))
    deadline = time.monotonic() + 60
    while True:
        try:
            assert client.get("/health").status_code == 200
            return server, client
        except httpx.TransportError:
            assert server.process.poll() is None, server.log_tail()
            assert time.monotonic() < deadline, server.log_tail()
            time.sleep(0.02)


def test_no_other_account_reaches_it(stand_in, tmp_path):
    """It has no port that a neighbour could take or call, and its sockets lie where no one else may look."""
    server, _ = started(tmp_path)
    try:
        assert server.url == f"unix:{server.folder}/socket"
        assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700
        sockets = [path for path in server.folder.iterdir() if path.is_socket()]
        assert sorted(len(path.name) for path in sockets) == [len("socket"), 36]
        process = psutil.Process(server.process.pid)
        assert [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN] == []
        assert not {"--host", "--port"} & {word.partition("=")[0] for word in process.cmdline()}
        environment = process.environ()
        assert environment["VLLM_HOST_IP"] == "127.0.0.1"
        assert environment["GLOO_SOCKET_IFNAME"] in psutil.net_if_addrs()
    finally:
        server.kill()


def test_nothing_is_left_of_a_killed_server(stand_in, tmp_path):
    server, _ = started(tmp_path)
    server.kill()
    assert not server.folder.exists()
    assert server.process.poll() is not None


def test_nothing_is_left_of_a_server_whose_trainer_was_killed(stand_in, tmp_path):
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_server_process import started
server, _ = started(Path({str(tmp_path)!r}))
print(server.process.pid, server.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = os.pathsep.join([str(stand_in), *filter(None, sys.path)])
    out = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert out.returncode == -signal.SIGKILL, out.stderr
    pid, folder = out.stdout.split()
    deadline = time.monotonic() + 30
    while Path(folder).exists() or (psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != "zombie"):
        assert time.monotonic() < deadline, list(Path(folder).iterdir())
        time.sleep(0.02)


def test_a_server_that_cannot_be_started_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Server({"model": "none"}, (), tmp_path / "file" / "log")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Its folder


def of_mode(folder: Path, mode: int) -> Path:
    folder.mkdir(exist_ok=True)
    folder.chmod(mode)
    return folder


@pytest.fixture
def parents(tmp_path, monkeypatch):
    """parents(TMPDIR, the other): where folders for sockets may be made; both are short enough in themselves."""
    short = Path(tempfile.mkdtemp(prefix="rto-test-", dir="/tmp"))

    def choose(first: Path, other: Path) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(first))
        monkeypatch.setattr(server_process, "SHORT", str(other))

    choose.short = short
    yield choose
    shutil.rmtree(short)


def test_the_folder_lies_in_tmpdir(parents):
    parents(of_mode(parents.short / "a", 0o1777), parents.short / "none")
    folder = socket_folder()
    assert folder.parent == parents.short / "a"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("fault", ["long", "open to the group", "open to all", "missing", "without modes"])
def test_a_folder_that_would_not_do_is_left_for_another(parents, fault, monkeypatch):
    first, other = parents.short / "first", of_mode(parents.short / "other", 0o700)
    if fault == "long":
        first = first / ("x" * (108 - 37 - 18 - len(os.fsencode(first / "x")) + 1))
        first.mkdir(parents=True)
    elif fault != "missing":
        of_mode(first, {"open to the group": 0o770, "open to all": 0o777}.get(fault, 0o700))
    if fault == "without modes":
        plain = tempfile.mkdtemp

        def make(prefix: str, dir: Path) -> str:
            return str(of_mode(Path(plain(prefix=prefix, dir=dir)), 0o755 if dir == first else 0o700))

        monkeypatch.setattr(tempfile, "mkdtemp", make)
    parents(first, other)
    assert socket_folder().parent == other
    assert not first.exists() or list(first.iterdir()) == []
    parents(first, first)
    with pytest.raises(ConfigError, match=r"TMPDIR: no folder for the socket .*\(/tmp/.*/first.*set TMPDIR"):
        socket_folder()


def test_the_longest_parent_that_does(parents):
    """One byte less than the one that is refused above."""
    first = parents.short / ("x" * (108 - 37 - 18 - len(os.fsencode(parents.short / "x"))))
    of_mode(first, 0o700)
    parents(first, parents.short / "none")
    folder = socket_folder()
    assert len(os.fsencode(folder / ("x" * 36))) == 107


# The group that weights come over


def test_the_trainer_and_its_servers_meet_in_the_folder(tmp_path):
    from rto_fast.rollout.weights import stream

    path = str(tmp_path / "weights")
    ours, theirs = stream.open_file(path, 2, 60), stream.open_file(path, 2, 60)
    ours.set("key", "value")
    assert theirs.get("key") == b"value"
    assert isinstance(ours, dist.FileStore)
    assert stat.S_IMODE(Path(path).stat().st_mode) & 0o022 == 0
