"""README.md's install lines in new environments against a package index; TEST_INSTALL=1 runs them.

pip resolves all packages and builds the metadata of those that come as sources, but installs nothing.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
from loop_helpers import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("TEST_INSTALL"), reason="minutes of a package index; TEST_INSTALL=1 runs it"),
]
LINES = [line.split("#")[0] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("pip install")]


def tried(python: str, line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", *shlex.split(line), "--dry-run", "--quiet"]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800, check=False)


@pytest.mark.parametrize("line", [line for line in LINES if "flash" not in line])
def test_a_new_environment(line, tmp_path):
    venv.create(tmp_path, with_pip=True)
    result = tried(str(tmp_path / "bin" / "python"), line)
    assert result.returncode == 0, result.stderr[-2000:]


def test_flash_attn_behind_the_trainer(tmp_path):
    """Beside this environment's packages but those that build others; without nvcc it says what it wants."""
    from torch.utils.cpp_extension import CUDA_HOME

    (line,) = (line for line in LINES if "flash" in line)
    before, install = (part.strip() for part in line.split("&&"))
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", *shlex.split(before), "--quiet"], check=True)
    (tmp_path / "packages").mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.lower().startswith(("wheel", "pip", "setuptools", "_distutils", "distutils")):
            (tmp_path / "packages" / path.name).symlink_to(path)
    result = tried(python, install, PYTHONPATH=str(tmp_path / "packages"))
    if CUDA_HOME:
        assert result.returncode == 0, result.stderr[-2000:]
    else:
        assert "CUDA_HOME environment variable is not set" in result.stderr, result.stderr[-2000:]
        assert "CUDA_HOME" in (ROOT / "README.md").read_text()
