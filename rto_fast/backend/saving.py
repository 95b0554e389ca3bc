"""When a run saves, and how a signal ends it without losing a step."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from rto_fast import distributed
from rto_fast.config import RunConfig
from rto_fast.errors import Preempted

DISK = 2e9
"""Bytes a second that are taken for granted where the time of a checkpoint is foretold."""
LONGEST_SHARE = 0.1
"""Share of a run's time that checkpoints by time alone may take."""


class Saving:
    """After each step, on every rank alike: a checkpoint where one is due, the run's end where a signal has come.

    A context manager: inside, SIGTERM and SIGUSR1 are kept until the step has ended; a second one ends the process.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.signal = 0
        self._since = time.monotonic()
        self._cost_s = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Saving:
        try:
            for number in distributed.SIGNALS:
                self._before[number] = signal.signal(number, self._heard)
        except ValueError:  # only the main thread may; elsewhere signals are the caller's
            pass
        self._since = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _heard(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self._before.get(number, signal.SIG_DFL))

    def plan(self, size: int) -> str:
        """When checkpoints are written and how long that may take, for the log; size: bytes of one."""
        config = self.config
        unit = "steps" if config.save_every != 1 else "step"
        regular = f"every {config.save_every} {unit}" if config.save_every else f"every {config.save_minutes:g} minutes"
        if not config.save_every and not config.save_minutes:
            regular = "off"
        each = f"{size / 2**30:.1f} GiB each, {max(1, round(size / DISK))} s at {DISK / 1e9:g} GB/s"
        return f"checkpoints: {regular}, and at the next step when SIGTERM or SIGUSR1 comes; {each}"

    def after(self, step: int, save: Callable[[], None]) -> None:
        """Ends step `step` (counted from 1); collective. Raises Preempted behind the checkpoint that a signal asks for.

        save: writes the checkpoint of this step, on all ranks.
        """
        heard = distributed.gather_objects((self.signal, self._due(step)))
        stop = max(number for number, _ in heard)
        due = heard[0][1]  # clocks differ between ranks
        if due or stop:
            begin = time.monotonic()
            save()
            self._since = time.monotonic()
            self._cost_s = self._since - begin
        if stop:
            raise Preempted(
                f"{signal.Signals(stop).name}: stopped behind step {step}, whose checkpoint is whole; "
                "go on with --resume auto"
            )

    def _due(self, step: int) -> bool:
        config = self.config
        if config.save_every:
            return step % config.save_every == 0
        wait_s = max(60 * config.save_minutes, self._cost_s / LONGEST_SHARE)
        return config.save_minutes > 0 and time.monotonic() - self._since >= wait_s
