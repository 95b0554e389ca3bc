"""From the command line to a run: flags, and one line for what cannot work.

Exit codes: 0 done; 2 the settings or the input cannot work, and nothing was written; 3 the run had to stop, and
what it had saved is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import logging
import os
import pkgutil
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NoReturn, Protocol, TypeVar, get_args, get_origin, get_type_hints

import tyro

from rto_fast.config import FOLLOWS
from rto_fast.errors import REFUSED, STOPPED, ConfigError, shown


class Settings(Protocol):
    """A dataclass whose fields are the flags."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        ...


C = TypeVar("C", bound=Settings)
# One rank speaks; the others give it this long before the launcher sees them fail and stops everyone.
_QUIET_SECONDS = 3.0


def parse(defaults: C, args: Sequence[str] | None = None, *, prog: str | None = None) -> C:
    """The config from flags named as its fields; exits with code 2 on a value that does not parse.

    Raises ConfigError on an unknown flag or choice (the nearest is suggested), and on one that follows from others.
    """
    args = sys.argv[1:] if args is None else args
    args = [a for a in args if not a.startswith("--local_rank")]  # the deepspeed launcher adds it
    _check_choices(defaults, args)
    config, unknown = tyro.cli(
        type(defaults), default=defaults, args=args, prog=prog, description=type(defaults).__doc__,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands), return_unknown_args=True,
    )  # fmt: skip
    if unknown:
        flag = unknown[0].split("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        fields = dataclasses.fields(defaults)
        if instead := next((f.metadata.get(FOLLOWS) for f in fields if f.name == name), None):
            raise ConfigError(f"{flag}: this command does not read it; {instead}")
        flags = ["--" + field.name.replace("_", "-") for field in fields if field.init]
        near = difflib.get_close_matches(flag.replace("_", "-"), flags, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"unknown flag {flag}; {hint}--help lists all")
    given: Any = config
    return dataclasses.replace(given)  # tyro takes what follows from other fields from the defaults


def _check_choices(defaults: Settings, args: Sequence[str]) -> None:
    """Raises ConfigError on a value that is none of its flag's choices."""
    kinds = get_type_hints(type(defaults))
    for arg, after in pairwise([*args, ""]):
        flag, equals, value = arg.partition("=")
        kind = kinds.get(flag.removeprefix("--").replace("-", "_")) if flag.startswith("--") else None
        choices = [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
        value = value if equals else after
        if choices and value not in choices:
            near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"{flag}: {value!r} is no choice; {hint}there are {', '.join(choices)}")


def speaks() -> bool:
    """Whether this rank reports errors, before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def main(defaults: C, run: str, args: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Parses the flags into a config like `defaults` and runs it; errors of the user's become one line.

    args: the flags, None = the process's; prog: the command's name in the help.
    run: "module:function", imported once the flags are known to be right: it takes seconds that --help need not wait.
    Exits with REFUSED or STOPPED (see the module), and with a traceback on anything unforeseen.
    """
    try:
        with contextlib.ExitStack() as stack:
            if not speaks():
                sink = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stderr(sink))
                stack.enter_context(contextlib.redirect_stdout(sink))
            config = parse(defaults, args, prog=prog)
        config.validate()
    except ConfigError as error:
        stop(error, REFUSED, speaks())
    except SystemExit as end:
        if end.code and not speaks():
            time.sleep(_QUIET_SECONDS)
        raise
    _run(config, run)


def _run(config: Settings, run: str) -> None:
    import datasets
    import torch
    import transformers

    from rto_fast import distributed
    from rto_fast.errors import DeviceLost, Diverged, Preempted, RewardError, RolloutError, StorageError, SyncError

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()  # loading is checked by rto_fast.models, with its own messages
    datasets.logging.set_verbosity(logging.CRITICAL)  # errors are reported by rto_fast.data.sources
    transformers.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # a file would hold each of their states
    warnings.filterwarnings("ignore", ".*is deprecated", FutureWarning, r"torch\.distributed")  # DeepSpeed's calls
    try:
        pkgutil.resolve_name(run)(config)
    except ConfigError as error:
        stop(error, REFUSED, distributed.speaks())
    except DeviceLost as error:
        print(f"error: {shown(error)}", file=sys.stderr, flush=True)
        os._exit(STOPPED)  # what ends in order would call the broken device, and die of that with another code
    except Preempted as error:
        for number in distributed.SIGNALS:  # another one, of a rank that heard late, must not cut the message off
            signal.signal(number, signal.SIG_IGN)
        stop(error, STOPPED, distributed.speaks())
    except (Diverged, RewardError, RolloutError, StorageError, SyncError) as error:
        stop(error, STOPPED, distributed.speaks())
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        stop(
            f"master_port: another process listens on port {port} of this machine; start with "
            "`deepspeed --master_port N ...`, N a free one",
            REFUSED,
            speaks(),
        )
    except OSError as error:
        if error.errno not in FULL:
            raise
        what = error.filename or "a file of the run"
        stop(f"{what} cannot be written: {error.strerror}. The last checkpoint is whole; make room and go on with "
             "--resume auto", STOPPED, distributed.speaks())  # fmt: skip
    except SystemExit as end:
        if end.code and not distributed.speaks():
            time.sleep(_QUIET_SECONDS)
        raise


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a full disk, a used-up quota and a limit on files give."""


def stop(error: Exception | str, code: int, speaks: bool) -> NoReturn:
    """Ends this rank; the one that speaks prints the error."""
    if speaks:
        print(f"error: {shown(error)}", file=sys.stderr, flush=True)
    else:
        time.sleep(_QUIET_SECONDS)
    sys.exit(code)
