"""From the command line to a run: flags, and one clear message with exit code 2 for what cannot work."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import transformers
import tyro

from rto_fast.config import ConfigError, RunConfig

C = TypeVar("C", bound=RunConfig)
# Rank 0 speaks; the others give it this long before the launcher sees them fail and stops everyone.
_QUIET_SECONDS = 3.0


def parse(defaults: C, args: Sequence[str] | None = None, *, prog: str | None = None) -> C:
    """The config from flags named as its fields; exits with code 2 on an unknown flag (the nearest is suggested)."""
    args = sys.argv[1:] if args is None else args
    args = [a for a in args if not a.startswith("--local_rank")]  # the deepspeed launcher adds it
    return tyro.cli(
        type(defaults), default=defaults, args=args, prog=prog, description=type(defaults).__doc__,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )  # fmt: skip


def main(defaults: C, run: Callable[[C], object]) -> None:
    """Parses the flags into a config like `defaults` and runs it. A ConfigError becomes one line and exit code 2."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()  # loading is checked by rto_fast.models, with its own messages
    transformers.logging.disable_progress_bar()
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        with contextlib.ExitStack() as stack:
            if not speaks:
                sink = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stderr(sink))
                stack.enter_context(contextlib.redirect_stdout(sink))
            config = parse(defaults)
        config.validate()
        run(config)
    except ConfigError as error:
        if speaks:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(_QUIET_SECONDS)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code and not speaks:
            time.sleep(_QUIET_SECONDS)
        raise
