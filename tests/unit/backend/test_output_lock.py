"""Two runs in one output folder: the second is refused, whoever holds the lock; a dead one's lock stops nobody."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys

import pytest
from loop_helpers import small_run

from rto_fast.backend.output_lock import locked
from rto_fast.errors import ConfigError

HOLD = """
import sys, time
from pathlib import Path
from rto_fast.backend.output_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock of tmp_path / "out"."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert "held" in process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_until_the_first_has_died(tiny, tmp_path, other, one_rank):
    from rto_fast import trainer
    from rto_fast.config import RTOConfig
    from rto_fast.supervised.sft import SFTConfig, train_sft

    out = tmp_path / "out"
    expected = re.escape(f"output_dir: {out} is in use by process {other.pid} on {socket.gethostname()}; ")
    before = sorted(p.name for p in out.iterdir())
    for resume in ("never", "auto"):
        with pytest.raises(ConfigError, match=expected):
            trainer.train(RTOConfig(**small_run(tiny, out, resume=resume)))
        with pytest.raises(ConfigError, match=expected):
            train_sft(SFTConfig(model=tiny.policy, data=tiny.texts, output_dir=str(out), resume=resume))
    assert sorted(p.name for p in out.iterdir()) == before

    other.send_signal(signal.SIGKILL)
    other.wait()
    trainer.train(RTOConfig(**small_run(tiny, out, iterations=1, report=False)))
    assert (out / "policy" / "model.safetensors").exists()
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]


def test_a_refused_run_leaves_no_folder(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output_dir: .*file is a file"), locked(tmp_path / "file" / "out"):
        pass
