"""No stage mixes tensors of two devices; and a stage that did would be found, at its line.

All of it on a device that only claims to be one (claimed.py), so that no GPU is needed.
"""

from __future__ import annotations

import json

import pytest
from dry_run import CASES, FAULTS
from launches import Launch
from loop_helpers import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{case or fault: how it failed}; in one process of its own, whose torch knows the device for good."""
    folder = tmp_path_factory.mktemp("dry")
    worker = ROOT / "tests" / "devices" / "dry_run.py"
    result = Launch([worker, folder / "found.json"], ranks=1, log=folder / "log").wait(600)
    assert result.returncode == 0, result.output
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_no_devices_are_mixed(outcomes, case):
    assert not outcomes[case], outcomes[case]


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_mixes_are_found_at_their_lines(outcomes, fault):
    assert not outcomes[fault], outcomes[fault]
