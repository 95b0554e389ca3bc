"""What a run shows: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

COLUMNS = (
    ("reward", "reward/score", ".3f"),
    ("true reward", "true/reward", ".3f"),
    ("DPO reward", "reward/dpo", ".3f"),
    ("KL, nats", "kl/response", ".3f"),
    ("length", "response/length", ".1f"),
    ("policy loss", "policy/loss", ".4f"),
    ("value loss", "critic/loss", ".4f"),
    ("loss", "train/loss", ".4f"),
    ("accuracy", "train/accuracy", ".3f"),
    ("margin", "train/margin", ".3f"),
    ("eval loss", "eval/loss", ".4f"),
    ("eval acc.", "eval/accuracy", ".3f"),
    ("tokens/s", "rate/tokens_s", ",.0f"),
)
"""Console columns: header, metric, format. Those a run never logs are not shown."""
HEADER_EVERY = 20
"""Console rows between two headers."""
PLAIN_PROGRESS_S = 30.0
"""Seconds between progress lines inside a phase when there is no terminal."""


class LiveDisplay:
    """Two lines at the terminal's foot: the run, and the phase it is in."""

    def __init__(self, console: Console, stage: str, done: int, total: int) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description:<12}"),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            refresh_per_second=4,
        )
        self._run = self._progress.add_task(stage, total=total or None, completed=done, note=f"step {done}/{total}")
        self._phase = self._progress.add_task("", total=None, note="", visible=False)
        self._running = False

    def enter(self, name: str) -> None:
        if not self._running:  # not before the first phase, so that set-up prints undisturbed
            self._progress.start()
            self._running = True
        self._progress.reset(self._phase, total=None, description=name, note="", visible=True)

    def update(self, done: int, total: int | None, note: str) -> None:
        self._progress.update(self._phase, completed=done, total=total, note=note)

    def leave(self) -> None:
        self._progress.update(self._phase, visible=False)

    def step(self, step: int, note: str) -> None:
        self._progress.update(self._run, completed=step, note=note)

    def close(self) -> None:
        if self._running:
            self._progress.stop()
            self._running = False


class PlainDisplay:
    """For pipes and log files: a line now and then inside a long phase, and nothing that moves."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._name = ""
        self._printed = 0.0

    def enter(self, name: str) -> None:
        self._name, self._printed = name, time.perf_counter()

    def update(self, done: int, total: int | None, note: str) -> None:
        now = time.perf_counter()
        if now - self._printed >= PLAIN_PROGRESS_S:
            self._printed = now
            self._console.print(escape(f"  {self._name}: {note}"), soft_wrap=True)

    def leave(self) -> None:
        """A finished phase needs no line; its seconds are in the row."""

    def step(self, step: int, note: str) -> None:
        """The row has been printed."""

    def close(self) -> None:
        """Nothing to take down."""
