"""A killed launcher takes its trainers with it, and they save first."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time

import psutil
import pytest
from launches import environment, free_port
from loop_helpers import ROOT, small_run
from recipe_helpers import flags_of

pytestmark = pytest.mark.slow


def wait_for(what, seconds: float, log) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@pytest.mark.parametrize("which", ["deepspeed", "deepspeed.launcher.launch"])
def test_trainers_end_with_their_launcher(tiny, tmp_path, which):
    """SIGKILL to the command, or to the process below it that starts the ranks."""
    out, log = tmp_path / "out", tmp_path / "log"
    flags = flags_of(small_run(tiny, out, iterations=2000, report=False))
    command = ["deepspeed", "--num_accelerators", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port()),
               "recipes/rto_llama3.py", *flags]  # fmt: skip
    with log.open("w") as sink:
        launcher = subprocess.Popen(
            command, env=environment(), cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    everyone = []
    try:
        metrics = out / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size, 240, log)
        everyone = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
        trainers = [p for p in everyone if "recipes/rto_llama3.py" in p.cmdline()[:4]]
        assert len(trainers) == 2
        next(p for p in everyone if any(os.path.basename(word) == which for word in p.cmdline())).kill()
        wait_for(lambda: not any(p.is_running() and p.status() != "zombie" for p in trainers), 60, log)
        assert "SIGTERM: stopped behind step" in log.read_text()
        assert list((out / "checkpoints").glob("step-*/state.json"))
    finally:
        for process in everyone or [launcher]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.wait()
