"""A vLLM server as a child of the trainer, which dies with it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rto_fast
from rto_fast.rollout.vllm_engines import serve
from rto_fast.rollout.vllm_engines.support import SETTINGS

EXTENSION = "rto_fast.rollout.vllm_engines.worker_extension.WeightReceiver"
SERVER_SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"}
"""Environment of a server, beside what vLLM is told in the trainer's process."""
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment of the trainer's ranks, which is not the server's."""


class Server:
    """A vLLM server on 127.0.0.1, a child of this process that dies with it."""

    def __init__(self, flags: dict[str, Any], switches: Sequence[str], log: Path, device_id: str = "") -> None:
        """flags: of `vllm serve`, with values; switches: those without; device_id: the CUDA device it may see."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        flags = flags | {
            "host": "127.0.0.1", "port": port, "logprobs-mode": "processed_logprobs", "generation-config": "vllm",
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
        there, lifeline = os.pipe()
        env = SETTINGS | {k: v for k, v in os.environ.items() if k not in RENDEZVOUS} | SERVER_SETTINGS
        env[serve.LIFELINE] = str(there)
        env |= {"CUDA_VISIBLE_DEVICES": device_id} if device_id else {}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(rto_fast.__file__).parents[1]), *sys.path]))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                command, env=env, stdout=sink, stderr=subprocess.STDOUT, pass_fds=[there], start_new_session=True
            )
        os.close(there)
        self.kill = weakref.finalize(self, _kill, self.process, lifeline)  # called at exit at the latest

    def log_tail(self) -> str:
        """Its log's errors and last lines, as a part of an error message."""
        lines = self.log.read_text(errors="replace").splitlines()
        shown = [line for line in lines[:-5] if re.search(r"\w(Error|Exception): ", line)][-5:] + lines[-5:]
        return "".join(f"\n  {line}" for line in (f"from {self.log}:", *shown))


def _kill(process: subprocess.Popen[bytes], lifeline: int) -> None:
    """Ends a server and its children."""
    os.close(lifeline)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
