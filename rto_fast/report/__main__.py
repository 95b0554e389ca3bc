"""The report's command line: rto-fast report RUN_DIR."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from rto_fast.errors import shown
from rto_fast.report.page import report_run


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 when the folder holds no readable run."""
    parser = argparse.ArgumentParser(prog="rto-fast report", description="Build report.html again from a run's files.")
    parser.add_argument("run_dir", help="output folder of a run")
    parser.add_argument("--samples", type=int, default=16, help="sampled responses shown at most (16)")
    parser.add_argument("--title", default="", help="heading; empty = stage and folder")
    args = parser.parse_args(argv)
    try:
        if args.samples < 0:
            raise ValueError(f"--samples: must not be negative, got {args.samples}")
        print(report_run(os.path.expanduser(args.run_dir), title=args.title, limit=args.samples))
    except (OSError, ValueError) as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
