"""The `rto-fast` command, also `python -m rto_fast`; see commands.py."""

from __future__ import annotations

import importlib.util
import sys

from rto_fast.errors import REFUSED

NEEDED = (
    "datasets",
    "deepspeed",
    "filelock",
    "httpx",
    "matplotlib",
    "psutil",
    "rich",
    "tenacity",
    "transformers",
    "tyro",
)
"""Packages of the `train` extra without which nothing here starts."""


def main() -> None:
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        print(f"error: not installed: {', '.join(lacking)}; pip install 'rto-fast[train]'", file=sys.stderr)
        sys.exit(REFUSED)
    from rto_fast import commands

    commands.main(sys.argv[1:])


if __name__ == "__main__":
    main()
