"""The designs' statistics on data whose answers are known."""

from __future__ import annotations

import itertools
import math
import random
from statistics import mean

import pytest

from bench.claim import estimates
from bench.claim.estimates import (
    at_kl,
    bootstrap_factor,
    detectable,
    differences,
    factor,
    first_reach,
    holm,
    interval,
    mean_differences,
    sign_flip_p,
)
from bench.claim.report import shown


def test_interval_is_students_t():
    middle, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert middle == 3
    assert half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)
    assert math.isnan(interval([1.0])[1])
    assert shown([2.0, 4.0], "+") == "+3.00 ± 12.71"
    assert shown([2.0]) == "2.00"


def test_quantiles_agree_with_their_closed_forms():
    p = 0.975
    assert estimates.T975[0] == pytest.approx(math.tan(math.pi * (p - 0.5)), abs=1e-3)
    assert estimates.T975[1] == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), abs=1e-3)
    assert list(estimates.T975) == sorted(estimates.T975, reverse=True)
    assert estimates.T975[-1] > 1.96


def test_intervals_cover_as_often_as_they_say():
    rng = random.Random(0)
    hits = 0
    for _ in range(2000):
        middle, half = interval([rng.gauss(1.0, 2.0) for _ in range(12)])
        hits += abs(middle - 1.0) <= half
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


# p values


def test_sign_flips_are_counted():
    assert sign_flip_p([1.0, 2.0, 3.0]) == 2 / 8, "all positive: itself and its mirror image"
    assert sign_flip_p([1.0, 1.0, -1.0]) == 1.0
    values = [0.3, -0.1, 0.8, 0.4, -0.2]
    here = abs(sum(values))
    flips = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in itertools.product((1, -1), repeat=5)
    ]
    assert sign_flip_p(values) == sum(f >= here - 1e-12 for f in flips) / 32
    assert math.isnan(sign_flip_p([]))


def test_p_values_are_below_a_level_as_often_as_it_says():
    rng = random.Random(1)
    found = [sign_flip_p([rng.gauss(0, 1) for _ in range(10)]) for _ in range(1000)]
    assert mean(p <= 0.05 for p in found) == pytest.approx(0.05, abs=0.02)
    assert mean(sign_flip_p([rng.gauss(2, 1) for _ in range(10)]) <= 0.05 for _ in range(200)) > 0.95


def test_holms_example():
    """Adjusted by hand: .01 * 4, .02 * 3, max(.03 * 2, .06), max(.5, .06)."""
    adjusted = holm({"d": 0.5, "a": 0.01, "c": 0.03, "b": 0.02})
    assert adjusted == pytest.approx({"d": 0.5, "a": 0.04, "c": 0.06, "b": 0.06})
    assert list(adjusted) == ["d", "a", "c", "b"]
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


# Rewards at equal KL


def curve_of(slope: float, kls: tuple[float, ...]) -> list[tuple[float, float]]:
    return [(0.0, 0.0), *((k, slope * math.sqrt(k)) for k in kls)]


def test_rewards_that_rise_as_the_root_are_exact_between_points():
    points = curve_of(1.5, (9.0, 2.0, 5.0))
    for kl in (0.0, 0.5, 2.0, 4.0, 7.7, 9.0):
        assert at_kl(points, kl) == pytest.approx(1.5 * math.sqrt(kl))
    assert math.isnan(at_kl(points, 9.1)), "nothing is extrapolated"


def test_a_kl_estimate_below_zero_counts_as_zero():
    assert at_kl([(-0.01, 0.1), (4.0, 2.1)], 1.0) == pytest.approx(1.1)


def test_differences_at_equal_kl_are_paired_and_blind_to_how_far_a_method_goes():
    """RTO is worth .4 sqrt(KL) more on every seed, though seeds differ by far more and it goes twice as far."""
    slopes = {s: 1.0 + 0.5 * s for s in range(6)}
    ppo = {s: curve_of(a, (2.0, 4.0, 8.0)) for s, a in slopes.items()}
    rto = {s: curve_of(a + 0.4, (4.0, 8.0, 16.0)) for s, a in slopes.items()}
    assert differences(rto, ppo, 4.0) == pytest.approx(dict.fromkeys(range(6), 0.8))
    assert differences(rto, ppo, 9.0) == {}, "PPO has no model there"
    rto[6] = rto[0]
    assert 6 not in differences(rto, ppo, 4.0), "a seed of one method alone has no difference"


def test_the_mean_over_a_range_is_the_integral_where_both_reach():
    ppo, rto = {0: curve_of(1.0, (12.0,)), 1: curve_of(1.0, (3.5,))}, dict.fromkeys((0, 1), curve_of(2.0, (12.0,)))
    found = mean_differences(rto, ppo, 3.0, 10.0, least=0.5)
    integral = (10**1.5 - 3**1.5) / 1.5 / 7
    assert found == pytest.approx({0: integral}, rel=1e-3)
    assert set(mean_differences(rto, ppo, 3.0, 10.0, least=0.05)) == {0, 1}


# Factors of samples


def saturating(speed: float, top: float = 4.0, noise: float = 0.0, rng: random.Random | None = None) -> list:
    """0, then top * (1 - exp(-speed * n / 1000)) at budgets that double."""
    budgets = [256 * 2**i for i in range(6)]
    return [
        (0, 0.0),
        *((n, top * (1 - math.exp(-speed * n / 1000)) + (rng.gauss(0, noise) if rng else 0)) for n in budgets),
    ]


def test_first_reach():
    points = [(0, 0.0), (100, 1.0), (200, 0.5), (400, 2.0)]
    assert first_reach(points, 0.5) == 50
    assert first_reach(points, 1.5) == pytest.approx(200 + 200 * 2 / 3)
    assert first_reach(points, 2.5) == math.inf
    assert first_reach(points, -1.0) == 0


@pytest.mark.parametrize("share", [0.5, 0.75, 0.95])
def test_the_factor_of_speeds_is_found(share):
    """The same curve with half of the samples."""
    slow = saturating(0.4)
    fast = [(x / 2, y) for x, y in slow]
    assert factor([slow], [fast], share) == pytest.approx(2)
    assert factor([slow], [slow], share) == 1


def test_a_plateau_that_is_never_reached_is_a_factor_of_0():
    assert factor([saturating(0.8)], [saturating(0.8, top=2.0)], 0.75) == 0
    assert factor([saturating(0.8)], [saturating(0.8, top=3.0)], 0.5) < 1
    assert math.isnan(factor([[(0, 1.0), (256, 0.5)]], [saturating(0.8)], 0.5)), "PPO learns nothing"


def test_bootstrap_intervals_hold_the_true_factor():
    hits, widths = 0, []
    for trial in range(60):
        rng = random.Random(trial)
        slow = [saturating(0.4, noise=0.25, rng=rng) for _ in range(8)]
        fast = [[(x / 2, y) for x, y in saturating(0.4, noise=0.25, rng=rng)] for _ in range(8)]
        middle, low, high = bootstrap_factor(slow, fast, 0.75, draws=200, seed=trial)
        assert low <= middle <= high
        hits += low <= 2 <= high
        widths.append(high - low)
    assert hits >= 50
    assert mean(widths) < 3, "and they say something"


def test_seeds_are_drawn_in_pairs():
    """A factor of 2 on each seed, though seeds differ fourfold in speed, has a narrow interval."""
    slow = [saturating(0.2 * (1 + s)) for s in range(4)]
    fast = [[(x / 2, y) for x, y in c] for c in slow]
    _, low, high = bootstrap_factor(slow, fast, 0.5, draws=200)
    assert (low, high) == (2, 2)


def test_what_so_many_seeds_can_find():
    rng = random.Random(3)
    size = detectable(0.65, 12)
    assert size == pytest.approx((2.201 + 0.842) * 0.65 / math.sqrt(12))
    found = []
    for _ in range(1500):
        middle, half = interval([rng.gauss(size, 0.65) for _ in range(12)])
        found.append(abs(middle) > half)
    assert mean(found) == pytest.approx(0.8, abs=0.05)
