"""README.md's install lines but flash-attn's, in a new environment against a package index; TEST_INSTALL=1 runs them.

pip resolves all packages and builds the metadata of those that come as sources, but installs nothing.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import venv

import pytest
from loop_helpers import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("TEST_INSTALL"), reason="minutes of a package index; TEST_INSTALL=1 runs it"),
]
LINES = [line.split("#")[0] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("pip install")]


def tried(python: str, line: str) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", *shlex.split(line), "--dry-run", "--quiet"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)


@pytest.mark.parametrize("line", [line for line in LINES if "flash" not in line])
def test_a_new_environment(line, tmp_path):
    venv.create(tmp_path, with_pip=True)
    result = tried(str(tmp_path / "bin" / "python"), line)
    assert result.returncode == 0, result.stderr[-2000:]
