"""Designs A to D of the claim, as docs/results/protocol.md has them: every cell, table and figure by one command.

    python -m bench.claim                     # run again, it goes on where it stopped
    python -m bench.claim --tasks medium --designs A
    python -m bench.claim --report-only       # trains nothing

Cells run two at a time on two cores; a finished one is never run again. Writes OUT/designs.json, OUT/tables.md,
OUT/*.svg and, with --page, docs/results/designs.md.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a cell is too small for a second thread

from bench.claim import design_report, stories
from bench.claim.designs import Design, DesignConfig
from bench.claim.grid import ROOT, by_flags, opened
from rto_fast.errors import require


def main(config: DesignConfig) -> None:
    config.validate()
    tasks = [t for t in config.tasks if t not in stories.TASKS or stories.available()]
    for task in sorted({*config.tasks} - {*tasks}):
        print(f"{task}: no model at {stories.MODEL}; it is left out")
    require(bool(tasks), "tasks: none can be run here")
    with opened(config, ROOT / config.runs) as grid:
        designs = {task: Design(config, grid, task) for task in tasks}
        for design in designs.values():
            design.run()
    flags = [a for a in sys.argv[1:] if a not in ("--report-only", "--page")]
    record = {
        "command": f"python -m bench.claim {shlex.join(flags)}".strip(),
        "commits": sorted({c["commit"] for c in grid.found.values()}), "settings": dataclasses.asdict(config),
        "cells": list(grid.found.values()), "missing": sorted(c.name for c in grid.missing),
        "cpu_s": round(sum(c["cpu_s"] for c in grid.found.values()), 1),
    }  # fmt: skip
    print(design_report.write(config, designs, record, ROOT))
    print(design_report.seconds_by_kind(grid.found))
    print(f"{config.out}: designs.json, tables.md and the figures")


if __name__ == "__main__":
    by_flags(main, DesignConfig, __doc__)
