"""The designs' statistics: rewards at equal KL, paired differences, and factors of samples.

Seeds are paired: methods of one seed share task, data, models and prompts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev

import numpy as np

T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantile of Student's t with 1, 2, ... 30 degrees of freedom."""

Points = Sequence[tuple[float, float]]
"""(KL in nats, true reward) of one seed's models, or (samples, true reward) of one curve."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % t interval); the half width is NaN for one value."""
    if len(values) < 2:
        return mean(values), math.nan
    quantile = T975[len(values) - 2] if len(values) - 2 < len(T975) else 1.96
    return mean(values), quantile * stdev(values) / math.sqrt(len(values))


def sign_flip_p(values: Sequence[float]) -> float:
    """Two-sided p of a mean of 0: the share of all 2^n changes of signs whose mean is as far from 0, exact (n <= 20).

    It assumes that differences are as likely positive as negative, and no distribution.
    """
    if not values:
        return math.nan
    sums = np.zeros(1)
    for v in values:
        sums = np.concatenate([sums + v, sums - v])
    here = abs(sum(values))
    return float(np.mean(np.abs(sums) >= here - 1e-9 * max(1.0, here)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p values (Holm 1979): those below a level are significant at it, all of them together."""
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda k: p_values[k])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


# Design A: rewards at equal KL


def at_kl(points: Points, kl: float) -> float:
    """True reward at a KL, linear in sqrt(KL) between the points on both sides; NaN beyond the last one.

    points: of one seed and method, the SFT model's (0, reward) among them. In sqrt(KL), because the optimum of a
    reward that is normal under the SFT model rises as sqrt(2 KL).
    """
    order = sorted((math.sqrt(max(x, 0.0)), y) for x, y in points)
    wanted = math.sqrt(kl)
    if not order[0][0] <= wanted <= order[-1][0]:
        return math.nan
    return float(np.interp(wanted, [x for x, _ in order], [y for _, y in order]))


def running_best(points: Points) -> list[tuple[float, float]]:
    """Each model's reward replaced by the best of those that are no further: a run that collapsed counts as what came
    before it."""
    order = sorted(points)
    return list(zip((x for x, _ in order), itertools.accumulate((y for _, y in order), max), strict=True))


def differences(ours: Mapping[int, Points], theirs: Mapping[int, Points], kl: float) -> dict[int, float]:
    """Seed -> difference of the true rewards at a KL, where both methods reach it."""
    found = {s: at_kl(ours[s], kl) - at_kl(theirs[s], kl) for s in ours if s in theirs}
    return {s: d for s, d in found.items() if not math.isnan(d)}


def mean_differences(
    ours: Mapping[int, Points], theirs: Mapping[int, Points], low: float, high: float, least: float
) -> dict[int, float]:
    """Seed -> mean difference over `low` to `high` nats, as far as both methods reach; seeds where that is less than
    `least` of the range are left out."""
    steps = np.linspace(low, high, 29)
    found = {}
    for seed in ours:
        if seed in theirs:
            at = [at_kl(ours[seed], k) - at_kl(theirs[seed], k) for k in steps]
            reached = [d for d in at if not math.isnan(d)]
            if len(reached) >= least * len(steps):
                found[seed] = mean(reached)
    return found


# Design B: how many samples a level takes


def first_reach(points: Points, level: float) -> float:
    """Samples at which a curve first reaches a level, linear between its points; infinite where it never does."""
    order = sorted(points)
    if order[0][1] >= level:
        return order[0][0]
    for (x0, y0), (x1, y1) in itertools.pairwise(order):
        if y1 >= level:
            return x0 + (x1 - x0) * (level - y0) / (y1 - y0)
    return math.inf


def mean_curve(curves: Iterable[Points]) -> list[tuple[float, float]]:
    """Mean over seeds at each number of samples that all have."""
    tables = [dict(c) for c in curves]
    shared = sorted(set.intersection(*(set(t) for t in tables)))
    return [(x, mean(t[x] for t in tables)) for x in shared]


def factor(theirs: Sequence[Points], ours: Sequence[Points], share: float) -> float:
    """n_theirs / n_ours: by how much fewer samples we reach `share` of their plateau, on curves averaged over seeds.

    The plateau is the highest point of their mean curve, counted from its first one (no samples). 0 where we never
    reach the level; NaN where they learn nothing.
    """
    base = mean_curve(theirs)
    start, plateau = base[0][1], max(y for _, y in base)
    if plateau <= start:
        return math.nan
    level = start + share * (plateau - start)
    return first_reach(base, level) / first_reach(mean_curve(ours), level)


def bootstrap_factor(
    theirs: Sequence[Points], ours: Sequence[Points], share: float, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """(factor, lower, upper): 95 % of the factors of `draws` samples of the seeds, with replacement, seeds paired."""
    rng, n = np.random.default_rng(seed), len(theirs)
    found = [
        factor([theirs[i] for i in index], [ours[i] for i in index], share)
        for index in rng.integers(n, size=(draws, n)).tolist()
    ]
    low, high = np.nanquantile(found, [0.025, 0.975], method="nearest")
    return factor(theirs, ours, share), float(low), float(high)


def detectable(deviation: float, seeds: int, power_quantile: float = 0.842) -> float:
    """The mean difference that a paired t test of so many seeds finds four times in five, at 5 %; normal approximation
    of the power. deviation: of the differences over seeds."""
    return (T975[min(seeds - 2, len(T975) - 1)] + power_quantile) * deviation / math.sqrt(seeds)
