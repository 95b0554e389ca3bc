"""The figures of decoding without RL: where guided decoding is RTO's optimum and where not."""

from __future__ import annotations

import pytest

from bench import decoding


def test_guided_decoding_is_the_optimum_at_scale_1_alone():
    assert decoding.gap(1.0, seeds=3) == pytest.approx(0, abs=1e-12)
    assert decoding.gap(0.0, seeds=3) == pytest.approx(0, abs=1e-12)
    assert decoding.gap(0.5, seeds=3) > 1e-4
    assert decoding.gap(5.0, seeds=3) > decoding.gap(2.0, seeds=3) > 1e-3
