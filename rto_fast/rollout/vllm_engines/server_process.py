"""A vLLM server as a child of the trainer, which dies with it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rto_fast
from rto_fast import distributed
from rto_fast.errors import ConfigError
from rto_fast.rollout.vllm_engines import address, serve
from rto_fast.rollout.vllm_engines.support import SETTINGS

EXTENSION = "rto_fast.rollout.vllm_engines.worker_extension.WeightReceiver"
SERVER_SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"}
"""Environment of a server, beside what vLLM is told in the trainer's process."""
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment of the trainer's ranks, which is not the server's."""
SHORT = "/tmp"
"""Where the sockets' folder lies when TMPDIR does not do."""
NAME_BYTES = 36
"""Of the longest name of a socket in a server's folder, which is one of vLLM's own."""


class Server:
    """A vLLM server, a child of this process that dies with it.

    It listens on a socket in a folder that no other account may enter: none can call it, and none can take its place.
    """

    def __init__(self, flags: dict[str, Any], switches: Sequence[str], log: Path, device_id: str = "") -> None:
        """flags: of `vllm serve`, with values; switches: those without; device_id: the CUDA device it may see.

        Raises ConfigError where there is no place for its socket.
        """
        self.folder, self.log = socket_folder(), log
        self.url = f"{address.UNIX}{self.folder / 'socket'}"
        try:
            self._start(flags, switches, device_id)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _start(self, flags: dict[str, Any], switches: Sequence[str], device_id: str) -> None:
        flags = flags | {
            "uds": self.folder / "socket", "logprobs-mode": "processed_logprobs", "generation-config": "vllm",
            "worker-extension-cls": EXTENSION,
        }  # fmt: skip
        switches = [*switches, "enable-scale-out", "skip-tokenizer-init"]
        switches += ["disable-log-stats", "disable-uvicorn-access-log"]
        command = [
            sys.executable,
            "-m",
            "rto_fast.rollout.vllm_engines.serve",
            *(f"--{k}={v}" for k, v in flags.items()),
        ]
        command += [f"--{s}" for s in switches]
        env = SETTINGS | {k: v for k, v in os.environ.items() if k not in RENDEZVOUS} | SERVER_SETTINGS
        env |= {
            "VLLM_RPC_BASE_PATH": str(self.folder), "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": distributed.loopback(),
        }  # fmt: skip
        env |= {"CUDA_VISIBLE_DEVICES": device_id} if device_id else {}
        env |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if "enable-lora" in switches else {}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(rto_fast.__file__).parents[1]), *sys.path]))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        there, lifeline = os.pipe()
        env |= {serve.LIFELINE: str(there), serve.FOLDER: str(self.folder)}
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                command, env=env, stdout=sink, stderr=subprocess.STDOUT, pass_fds=[there], start_new_session=True
            )
        os.close(there)
        self.kill = weakref.finalize(self, _kill, self.process, lifeline, self.folder)  # called at exit at the latest

    def log_tail(self) -> str:
        """Its log's errors and last lines, as a part of an error message."""
        lines = self.log.read_text(errors="replace").splitlines()
        shown = [line for line in lines[:-5] if re.search(r"\w(Error|Exception): ", line)][-5:] + lines[-5:]
        return "".join(f"\n  {line}" for line in (f"from {self.log}:", *shown))


def socket_folder() -> Path:
    """A new folder for sockets, of mode 0700, in TMPDIR or else in /tmp.

    Raises ConfigError where others could put their own in its place, or sockets cannot stand in it: the path is too
    long (108 bytes are the most), or the file system has none.
    """
    refused = []
    for parent in dict.fromkeys((tempfile.gettempdir(), SHORT)):
        try:
            return _folder_in(Path(parent))
        except OSError as error:
            refused.append(f"{parent}: {error}")
    raise ConfigError(
        f"TMPDIR: no folder for the socket of a vLLM server ({'; '.join(refused)}); set TMPDIR to a short path that "
        "only you can write to, on a local disk"
    )


def _folder_in(parent: Path) -> Path:
    mode = parent.stat().st_mode
    if mode & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX:
        raise PermissionError("other accounts could rename what lies there")
    folder = Path(tempfile.mkdtemp(prefix="rto-vllm-", dir=parent))
    try:
        if stat.S_IMODE(folder.stat().st_mode) & 0o077:
            raise PermissionError("its file system keeps no modes")
        with socket.socket(socket.AF_UNIX) as tried:
            tried.bind(str(folder / ("x" * NAME_BYTES)))
        (folder / ("x" * NAME_BYTES)).unlink()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _kill(process: subprocess.Popen[bytes], lifeline: int, folder: Path) -> None:
    """Ends a server and its children, and deletes its folder."""
    os.close(lifeline)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)
