"""Distillation on a pretrained story model: its own samples against the teacher's, at equally many tokens."""

from __future__ import annotations

import pytest
from recipe_helpers import needs_shared

from bench.token_rewards import Distillation, TokenRewardConfig, distill_table

pytestmark = [needs_shared, pytest.mark.slow]


def test_own_samples_teach_more_than_the_teachers(one_rank, tmp_path):
    """KL(student || teacher) on prompts that neither saw, the better of two rates of SFT."""
    config = TokenRewardConfig(
        teacher_rows=600, held_out=128, iterations=8, rollout=64, tokens=48, own=("3e-4",), sft=(3e-5, 1e-4)
    )
    found = Distillation(config, tmp_path).run()
    print(distill_table(found))
    start, own, *taught = (figures["kl"] for figures in found.values())
    assert len(taught) == 2
    assert own < 0.9 * start
    assert own < min(taught)
