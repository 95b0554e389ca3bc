"""What a run says while it trains: the console, and every figure in files.

    metrics.jsonl   one JSON object a step, flushed; NaN and infinities are null
    tensorboard/    the same scalars
    run.json        stage, steps and settings, for the report; URLs without credentials

A row holds the metrics given to `log`, and for each phase since the last row `time/<phase>_s`, `time/<phase>_share`
(of all seconds since then) and `rate/<phase>_tokens_s`, with `rate/tokens_s` (sampled tokens, or else trained ones, a
second of everything),
`memory/peak_gib` and `run/elapsed_s`, the seconds of training over all starts.
"""

from __future__ import annotations

import math
import resource
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from rto_fast.config import check_wandb
from rto_fast.logs.console import COLUMNS, HEADER_EVERY, LiveDisplay, PlainDisplay
from rto_fast.logs.files import METRICS, RUN, SAMPLES, drop_after, duration, json_line, write_atomic
from rto_fast.redact import redacted

RATE_WINDOW = 20
"""Logged steps over which the time left is estimated."""


def peak_memory_gib() -> float:
    """Most memory this process has held so far, GiB: allocated on its GPU, or resident without one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB


class Phases:
    """Seconds and tokens a phase since the last `take`. An inner phase stops the outer one's clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self._open: list[str] = []
        self._since = 0.0

    @property
    def current(self) -> str | None:
        return self._open[-1] if self._open else None

    def _settle(self) -> None:
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def enter(self, name: str) -> None:
        self._settle()
        self._open.append(name)

    def leave(self) -> None:
        self._settle()
        self._open.pop()

    def take(self) -> tuple[dict[str, float], dict[str, int]]:
        """(seconds, tokens) by phase, and starts again; an open phase is counted up to now."""
        self._settle()
        taken = self.seconds, self.tokens
        self.seconds, self.tokens = {}, {}
        return taken


class RunLogger:
    """Logs one stage. Only rank 0 writes and prints; on other ranks every method does nothing.

    On resume (`start_step` = k > 0) the rows and samples of later steps are dropped, so that the files are as
    if the run had never been killed; log a step before saving its checkpoint. With start_step = 0 both start
    empty.
    `config` is the stage's settings as a dict; its "log_every" thins the console's rows, never the files'.
    Raises ConfigError when W&B is asked for and not installed.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        stage: str,
        total_steps: int,
        rank: int,
        wandb_project: str = "",
        config: dict,
        start_step: int = 0,
    ) -> None:
        check_wandb(wandb_project)  # on every rank, lest the others wait
        self.active = rank == 0
        if not self.active:
            return
        config = redacted(config)
        from torch.utils.tensorboard import SummaryWriter

        self._dir = Path(output_dir)
        self._dir.mkdir(parents=True, exist_ok=True)
        self._total = total_steps
        self._log_every = max(1, int(config.get("log_every", 1)))
        keep = start_step if start_step > 0 else -1  # a new run keeps no row, not even one of step 0
        rows = drop_after(self._dir / METRICS, keep)
        drop_after(self._dir / SAMPLES, keep)
        run = {"stage": stage, "total_steps": total_steps, "config": config}
        write_atomic(self._dir / RUN, json_line(run))
        self._file = (self._dir / METRICS).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self._dir / "tensorboard"), purge_step=start_step + 1 if start_step else None)
        self._wandb = self._start_wandb(wandb_project, stage, config) if wandb_project else None

        self._console = Console(highlight=False)
        self._display = (
            LiveDisplay(self._console, stage, start_step, total_steps)
            if self._console.is_terminal
            else PlainDisplay(self._console)
        )
        self._phases = Phases()
        self._span_start, self._span_tokens = time.perf_counter(), 0
        self._elapsed_before = (rows[-1].get("run/elapsed_s") or 0.0) if rows else 0.0
        self._start_time: float | None = None
        self._row_time = 0.0
        self._marks: deque[tuple[int, float]] = deque(maxlen=RATE_WINDOW)
        self._start_step = start_step
        self._shown: list[str] = []
        self._rows_printed = 0
        self._closed = False
        first = f"from step {start_step}" if start_step else "from the start"
        self.message(f"{stage}: {total_steps} steps, {first}; figures in {self._dir / METRICS}")

    def _start_wandb(self, project: str, stage: str, config: dict):
        import wandb

        id_file = self._dir / "wandb_id.txt"  # so that a resumed run goes on in the same W&B run
        if not id_file.exists():
            write_atomic(id_file, uuid.uuid4().hex)
        command, sys.argv = sys.argv, redacted(sys.argv)  # which W&B keeps too
        try:
            return wandb.init(
                project=project, name=f"{stage}-{self._dir.name}", config=config, dir=str(self._dir),
                id=id_file.read_text(encoding="utf-8").strip(), resume="allow",
            )  # fmt: skip
        finally:
            sys.argv = command

    def _start_clock(self) -> None:
        if self._start_time is None:
            self._start_time = self._row_time = time.perf_counter()
            self._marks.append((self._start_step, self._start_time))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block as phase `name` ("rollout", "score", "train", "sync", "checkpoint", ...).

        Waits for the GPU at the block's end, so that queued work counts where it was asked for. Phases may be
        entered again (their seconds add up until the next `log`) and nested (the outer clock stops).
        """
        if not self.active:
            yield
            return
        self._start_clock()
        outer = self._phases.current
        self._phases.enter(name)
        self._span_start, self._span_tokens = time.perf_counter(), 0
        self._display.enter(name)
        try:
            yield
        finally:
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self._phases.leave()
            self._display.leave()
            if outer is not None:
                self._span_start, self._span_tokens = time.perf_counter(), 0
                self._display.enter(outer)

    def progress(self, tokens: int, done: int = 0, total: int | None = None) -> None:
        """Inside a phase: `tokens` more were processed since the last call (all ranks', for the job's rate).

        done, total: units so far and in all, such as responses or micro-batches; total None = unknown.
        Raises RuntimeError outside any phase.
        """
        if not self.active:
            return
        name = self._phases.current
        if name is None:
            raise RuntimeError("RunLogger.progress: no phase is open; call it inside `with logger.phase(name):`")
        self._phases.tokens[name] = self._phases.tokens.get(name, 0) + int(tokens)
        self._span_tokens += int(tokens)
        rate = self._span_tokens / max(time.perf_counter() - self._span_start, 1e-9)
        parts = [f"{done:,}/{total:,}"] if total else [f"{done:,}"] if done else []
        parts += [f"{rate:,.0f} tokens/s"] if self._span_tokens else []
        self._display.update(done, total, " · ".join(parts))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Writes a row for `step` (from 1; 0 = before training) with the phases' figures since the last one.

        Raises TypeError naming the metric when a value is no number (a one-element tensor counts as one).
        """
        if not self.active:
            return
        self._start_clock()
        now = time.perf_counter()
        seconds, tokens = self._phases.take()
        elapsed = max(now - self._row_time, 1e-9)
        row: dict[str, float] = {}
        for name, value in metrics.items():
            try:
                row[name] = float(value)
            except (TypeError, ValueError):
                raise TypeError(f"RunLogger.log: metric {name!r} is no number: {value!r}") from None
        for name, spent in seconds.items():
            row[f"time/{name}_s"] = spent
            row[f"time/{name}_share"] = spent / elapsed
            if tokens.get(name):
                row[f"rate/{name}_tokens_s"] = tokens[name] / max(spent, 1e-9)
        whole = tokens.get("rollout") or tokens.get("train")
        if whole:
            row["rate/tokens_s"] = whole / elapsed
        row["memory/peak_gib"] = peak_memory_gib()
        row["run/elapsed_s"] = self._elapsed_before + now - self._start_time
        self._row_time = now
        self._marks.append((step, now))

        self._file.write(json_line({"step": step, **row}))
        self._file.flush()
        for name, value in row.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)
        self._board.flush()
        if self._wandb is not None:
            self._wandb.log(row, step=step)
        self._show(step, metrics, row)

    def _show(self, step: int, metrics: dict[str, float], row: dict[str, float]) -> None:
        left = self._time_left(step)
        self._display.step(step, f"step {step}/{self._total}" + (f" · {left} left" if left else ""))
        if metrics and all(name.startswith("eval/") for name in metrics):
            figures = ", ".join(f"{name.removeprefix('eval/')} {row[name]:.4f}" for name in metrics)
            self.message(f"{step:>6}/{self._total}  evaluation: {figures}")
            return
        if step % self._log_every and step != self._total and self._rows_printed:
            return
        cells = {head: format(row[key], form) for head, key, form in COLUMNS if key in row}
        heads = [head for head, _, _ in COLUMNS if head in cells or head in self._shown]
        if heads != self._shown or self._rows_printed % HEADER_EVERY == 0:
            self._shown = heads
            titles = "".join(f"  {head:>{max(len(head), 8)}}" for head in heads)
            self._print(f"{'step':>13}{titles}  {'time left':>9}", "bold")
        values = "".join(f"  {cells.get(head, '-'):>{max(len(head), 8)}}" for head in heads)
        self._print(f"{f'{step}/{self._total}':>13}{values}  {left or '-':>9}")
        self._rows_printed += 1

    def _time_left(self, step: int) -> str:
        (first_step, first_time), (_, last_time) = self._marks[0], self._marks[-1]
        if step <= first_step:
            return ""
        return duration((last_time - first_time) / (step - first_step) * max(0, self._total - step))

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(escape(text), style=style, soft_wrap=True)

    def message(self, text: str) -> None:
        """Prints a line."""
        if self.active:
            self._print(text)

    def warn(self, text: str) -> None:
        """Prints a line that begins with `warning:`."""
        if self.active:
            self._print(f"warning: {text}", "yellow")

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the display and closes the files; may be called again."""
        if not self.active or self._closed:
            return
        self._closed = True
        self._display.close()
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
