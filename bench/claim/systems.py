"""Design D: a row for each variant that came later, beside what it varies; no hypotheses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

UNTUNED = {"P3O": 5e-4, "MPO": 5e-4, "DPO": 5e-4}
"""Learning rates of methods that design A does not tune."""
ALPHA = 0.3
"""Of the extrapolation between rounds."""


@dataclass(frozen=True)
class System:
    """A method with a setting of its own."""

    name: str
    method: str
    change: tuple[tuple[str, Any], ...] = ()
    against: str = ""
    """Name of the row that it varies; empty = it is one of those."""


SYSTEMS = (
    System("RTO", "RTO"),
    System("RTO, running score scale", "RTO", (("score_scale", "running"),), "RTO"),
    System("RTO, mean of two DPO models", "RTO", (("dpo_models", 2),), "RTO"),
    System("RTO, mean less half a deviation", "RTO", (("dpo_models", 2), ("dpo_pessimism", 0.5)), "RTO"),
    System("RTO, DPO's second round", "RTO", (("round", 2),), "RTO"),
    System(f"RTO, rounds extrapolated by {ALPHA:g}", "RTO", (("extrapolate", ALPHA),), "RTO"),
    System("P3O, joint clip", "P3O"),
    System("P3O, separate clip", "P3O", (("p3o_clip", "separate"),), "P3O, joint clip"),
    System("DPO", "DPO"),
    System("MPO, no reference", "MPO", (), "DPO"),
)
