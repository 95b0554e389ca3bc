"""Which versions of vLLM may sample."""

from __future__ import annotations

import warnings

import pytest

from rto_fast.rollout.vllm_engines import support
from rto_fast.rollout.vllm_engines.support import OLDEST_SERVED, too_old, unusable


@pytest.mark.parametrize("version", ["0.26.0", "0.27.1", "0.31.0", "0.32.0", "0.33.0", "0.33.1rc2", "0.32.1.dev7"])
def test_accepted(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert too_old(version) == ""


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("0.25.1", "vLLM 0.25.1 is too old (0.26 or newer is needed)"),
        ("0.3.2", "vLLM 0.3.2 is too old (0.26 or newer is needed)"),
        ("dev", "vLLM's version 'dev' does not say its series (0.26 or newer is needed)"),
    ],
)
def test_refused(version, why):
    assert too_old(version) == why


def test_servers_must_know_the_version_of_their_weights():
    assert too_old("0.31.0", OLDEST_SERVED) == "vLLM 0.31.0 is too old (0.32 or newer is needed)"
    assert too_old("0.32.0", OLDEST_SERVED) == ""


@pytest.mark.parametrize("version", ["0.34.0", "0.100.0", "1.0.0"])
def test_newer_ones_warn(version):
    with pytest.warns(UserWarning, match=f"vLLM {version} is newer than 0.33, the newest that was tried"):
        assert too_old(version) == ""


def test_an_old_one_is_refused_before_it_is_imported(monkeypatch):
    monkeypatch.setattr(support, "installed", lambda: "0.25.1")
    assert "too old" in unusable("no/such/model", "cpu")
