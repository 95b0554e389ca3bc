"""Formulas of the loop that need no model: whitening, the KL coefficient, what a loss is divided by."""

from __future__ import annotations

import pytest
import rto_kernels
import torch

from rto_fast.algo.losses import loss_denominator
from rto_fast.algo.targets import KLController

RESPONSES = [5, 1, 0, 12, 7, 0, 3, 9]
"""Tokens of responses, two of them empty."""


def test_whitening_of_equal_advantages():
    """The variance is bounded below by 1e-8: equal advantages become 0, not NaN."""
    rewards, values = torch.zeros(6), torch.full((6,), 0.5)
    moments = rto_kernels.gae(rewards, values, gamma=0.0, lam=0.0, cu_seqlens=torch.tensor([0, 2, 6])).moments
    mean, rstd = rto_kernels.whiten_moments(moments)
    assert float(mean) == -0.5
    assert float(rstd) == pytest.approx(1e4)


def test_fixed_kl_coefficient_stays():
    controller = KLController(0.01, 0.0, 100)
    controller.update(5.0, 64)
    assert controller.beta2 == 0.01


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(0.05, 1.0), (0.055, 1 + 0.1 * 0.25), (1.0, 1 + 0.2 * 0.25), (0.0, 1 - 0.2 * 0.25), (-3.0, 1 - 0.2 * 0.25)],
)
def test_adaptive_kl_coefficient(kl, factor):
    """beta2 *= 1 + clip(KL / target - 1, +-0.2) * n / horizon, n the rollout's responses."""
    controller = KLController(0.02, 0.05, 256)
    controller.update(kl, 64)
    assert controller.beta2 == pytest.approx(0.02 * factor)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_loss_denominator_counts_what_is_not_empty(aggregation):
    lens = torch.tensor(RESPONSES)
    expected = 6 if aggregation == "sequence" else sum(RESPONSES)
    assert float(loss_denominator(lens, aggregation)) == expected
    assert float(loss_denominator(torch.zeros(3, dtype=torch.int64), aggregation)) == 1


def test_a_rollout_far_beyond_the_horizon_leaves_beta2_its_sign():
    controller = KLController(0.02, 0.05, 10)
    controller.update(0.0, 1000)
    assert controller.beta2 == pytest.approx(0.02 * 0.8)
    controller.update(1.0, 1000)
    assert controller.beta2 == pytest.approx(0.02 * 0.8 * 1.2)
