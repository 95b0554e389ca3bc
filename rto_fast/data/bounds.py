"""Bounds on what a chat template may cost.

A model's template is code that others wrote.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import jinja2

if sys.platform != "win32":
    import resource

SECONDS = 10.0
"""Processor time of one rendering."""
MEMORY = 2**30
"""Bytes that one rendering may take."""
CHARACTERS = 10_000_000
"""Length of one rendered conversation."""
MESSAGE = 300
"""Characters shown of what a template or its folder says."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """What runs inside raises jinja2.TemplateError where it takes too much time or memory.

    Both are bounds of the process that are set back at the end; signals reach the main thread only, so that another
    thread has no bound on time, and a system without /proc none on memory.
    """
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(_bounded_time())
        stack.enter_context(_bounded_memory())
        try:
            yield
        except MemoryError as e:
            raise jinja2.TemplateError(f"it takes more than {MEMORY / 2**30:g} GiB") from e


@contextlib.contextmanager
def _bounded_time() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise jinja2.TemplateError(f"it takes more than {SECONDS:g} seconds")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    try:
        statm = os.open("/proc/self/statm", os.O_RDONLY)  # a fifth of what Python's own open takes
        taken = int(os.read(statm, 100).split()[0]) * os.sysconf("SC_PAGE_SIZE")
        os.close(statm)
    except OSError:
        yield
        return
    soft, hard = before = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (taken + MEMORY, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
