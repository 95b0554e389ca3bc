"""End a process that hangs in a call which nothing inside it can interrupt."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rto_fast.errors import STOPPED


@contextmanager
def watched(limit_s: float, what: str) -> Iterator[Callable[[], None]]:
    """Inside, the function that it gives must be called at least every `limit_s` seconds.

    Else every thread's stack and a message that begins with `what` go to stderr, and the process ends at once with
    exit code 3: a launcher then ends the other ranks. Nothing is cleaned up, so no file may be half-written inside.
    A call that holds Python's own lock all the while cannot be ended.
    """
    last, over = [time.monotonic()], threading.Event()

    def beat() -> None:
        last[0] = time.monotonic()

    def look() -> None:
        while not over.wait(max(0.0, last[0] + limit_s - time.monotonic())):
            if time.monotonic() >= last[0] + limit_s:
                faulthandler.dump_traceback(file=sys.__stderr__)
                print(f"error: {what} for {limit_s:g} s; this process ends. The last checkpoint is whole",
                      file=sys.__stderr__, flush=True)  # fmt: skip
                os._exit(STOPPED)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield beat
    finally:
        over.set()
        thread.join()
