"""Verifiable rewards teach the embedded sums: more held-out problems are solved.

On one seed here; docs/training.md has three, and the command that gives them.
"""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow


def test_more_held_out_problems_are_solved(one_rank, tmp_path):
    from rto_fast.demo.arithmetic import run
    from rto_fast.demo.config import ArithmeticConfig

    found = run(ArithmeticConfig(output_dir=str(tmp_path / "out"), seed=2))
    assert 0.3 < found["SFT"] < 0.7
    assert found["RLVR"] > found["SFT"] + 0.15
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    rows = [json.loads(line) for line in (tmp_path / "out" / "rlvr" / "metrics.jsonl").read_text().splitlines()]
    name = "reward/rto_fast.scoring.math_answers:last_number"
    assert rows[-1][name] > rows[0][name]
    assert rows[-1][f"{name}/answered"] > 0.99
    assert rows[-1][f"{name}/unreadable"] == 0
