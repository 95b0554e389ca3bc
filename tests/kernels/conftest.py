"""Every kernel test runs with uninitialised memory set to NaN, and with blocks small enough to cross."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from rto_kernels import _layout, _vocab_torch, logits_logprob
from rto_kernels._dispatch import INTERPRET

settings.register_profile(
    "kernels",
    deadline=None,
    derandomize=True,
    max_examples=25 if INTERPRET else 60,
    # To know that a planted fault is found, nobody needs its smallest example.
    phases=(Phase.generate,) if os.environ.get("RTO_KERNELS_MUTANT") else tuple(Phase),
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
settings.load_profile("kernels")


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty returns NaN (integers: the largest), so an output that a kernel forgets to write shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The interpreter scans a token at a time; blocks of 16 keep it quick, and 17 tokens cross one.

    The PyTorch path's blocks are as small, so that a problem of a few tokens and words has several.
    """
    if INTERPRET:
        monkeypatch.setattr(_layout, "BLOCK", 16)
        monkeypatch.setattr(_layout, "MERGE_ROWS", 2)
    monkeypatch.setattr(_vocab_torch, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(_vocab_torch, "BLOCK_VOCAB", 32)
    monkeypatch.setattr(logits_logprob, "BLOCK_ELEMENTS", 256)


@pytest.fixture(autouse=True)
def no_leftover_warnings_from_numpy():
    """The interpreter computes with numpy, which warns where exp overflows on purpose."""
    import numpy

    with numpy.errstate(all="ignore"):
        yield


@pytest.fixture
def module():
    """`module("gae")`: the submodule, where the package's attribute of that name is the function."""
    return lambda name: importlib.import_module(f"rto_kernels.{name}")


@pytest.fixture
def peers(monkeypatch):
    """The sources of OpenRLHF and verl that `make` has put beside the environment's own packages can be imported."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(sys.prefix) / "peers")])


@pytest.fixture
def ordinary_memory(nan_filled_memory):
    """For libraries that were not written for NaN-filled memory."""
    torch.use_deterministic_algorithms(False)
