"""A step that hangs ends the process; one that returns does not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from loop_helpers import ROOT

from rto_fast.rollout import watchdog
from rto_fast.rollout.watchdog import watched

HANGS = """
import time
from rto_fast.contract import Request
from rto_fast.rollout.assignment import Tally
from rto_fast.rollout.vllm_engines.colocated import HUNG, VLLMEngine
from rto_fast.rollout.watchdog import watched

class Core:
    def has_unfinished_requests(self):
        return True

    def step(self):
        time.sleep(600)

engine = VLLMEngine.__new__(VLLMEngine)
engine.timeout_s = 0.1
with watched(HUNG * engine.timeout_s, "a step of vLLM has not returned") as beat:
    list(engine._steps(Core(), Tally([Request((1,), 0, 0, 0, 0)], None), beat))
"""


@pytest.fixture
def exits(monkeypatch):
    """Exit codes of processes that would have ended; only the watchdog's thread does."""
    codes = []

    def leave(code):
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    return codes


@pytest.mark.slow
def test_beats_keep_the_process_alive(exits):
    with watched(3.0, "nothing") as beat:
        for _ in range(35):
            time.sleep(0.1)
            beat()
    assert not exits


def test_silence_ends_it(exits):
    with watched(0.2, "nothing") as beat:
        beat()
        time.sleep(1.5)
    assert exits == [3]


def test_nothing_is_left_of_it(exits):
    before = threading.active_count()
    with pytest.raises(KeyError), watched(60.0, "nothing"):
        raise KeyError
    assert threading.active_count() == before


@pytest.mark.slow
def test_a_step_that_hangs_ends_the_process():
    """The engine's loop over a step that sleeps in the place of vLLM's."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    result = subprocess.run([sys.executable, "-c", HANGS], env=env, capture_output=True, text=True, timeout=180)
    assert result.returncode == 3, result.stderr
    assert "in step" in result.stderr  # where it hangs
    assert "error: a step of vLLM has not returned for 0.2 s; this process ends. The last checkpoint is whole" in (
        result.stderr
    )
