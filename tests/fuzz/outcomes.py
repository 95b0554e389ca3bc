"""Every case ends in a right run or in a refusal of one line; how many cases there are.

Little is tried in `make test`, the same cases each time; `make fuzz` (RTO_FUZZ=full) draws many, new ones each time,
and prints its seed: a failure comes again under `--hypothesis-seed`, and hypothesis makes the case small and prints it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections import Counter
from dataclasses import dataclass

from hypothesis import HealthCheck, settings

from rto_fast.errors import REFUSED, STOPPED, shown

FULL = os.environ.get("RTO_FUZZ") == "full"


def examples(quick: int, full: int):
    """As a decorator: so many cases, however long each takes."""
    return settings(
        max_examples=full if FULL else quick, deadline=None, derandomize=not FULL, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    code: int
    message: str
    """Of a refusal; empty for a run that ended well."""


def one_line(error: BaseException | str, about: str = "") -> str:
    """The message, which must name what it is about; what a terminal shows of it is one line."""
    message = str(error)
    assert about in message, message
    assert message.strip(), f"{type(error).__name__} without a message"
    assert len(message.splitlines()) == 1, message
    assert shown(message).isprintable()
    return message


def command(args: list[str]) -> Outcome:
    """What `rto-fast args` does, in this process; fails on a traceback and on more or less than one message."""
    from rto_fast import commands

    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            commands.main(args)
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            err.write(traceback.format_exc())
            code = 1
    said = err.getvalue()
    assert code in (0, REFUSED, STOPPED), f"exit code {code}: {said[-3000:]}"
    if not code:
        return Outcome(0, "")
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if not lines and code == REFUSED:  # a value that is no number: the parser's own box
        assert "For full helptext" in said, said
        return Outcome(code, said.strip())
    assert len(lines) == 1, said[-3000:]
    assert lines[0].isprintable()
    assert said.rstrip().endswith(lines[0]), f"the message is not the last word, or has more than one line: {said}"
    return Outcome(code, one_line(lines[0].removeprefix("error: ")))


class Tally(Counter):
    """How cases ended; printed when the test is over, so that nobody takes 1,000 refusals for 1,000 runs."""

    def __call__(self, kind: str) -> None:
        self[kind] += 1

    @contextlib.contextmanager
    def shown(self, name: str):
        yield self
        print(f"\n{name}: " + ", ".join(f"{n:,} {kind}" for kind, n in self.most_common()), file=sys.__stderr__)
