"""What a flag offers is what there is: each choice has its one entry."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from rto_fast.algo.advantages import ESTIMATORS
from rto_fast.algo.credit import CREDIT
from rto_fast.config import DPOConfig, RTOConfig
from rto_fast.models.quantised import CODES
from rto_fast.supervised.dpo import OBJECTIVES
from rto_fast.trainer import ONLINE, POLICY_UPDATES


@pytest.mark.parametrize(
    ("config", "field", "entries"),
    [
        (DPOConfig, "objective", OBJECTIVES),
        (RTOConfig, "credit", CREDIT),
        (RTOConfig, "advantage", ESTIMATORS),
        (RTOConfig, "policy_update", POLICY_UPDATES),
        (RTOConfig, "online", {"off", *ONLINE}),
        (RTOConfig, "frozen_dtype", {"off", *CODES}),
        (RTOConfig, "lora_base_dtype", {"off", *CODES}),
    ],
)
def test_every_choice_has_its_entry(config, field, entries):
    assert set(get_args(get_type_hints(config)[field])) == set(entries)
