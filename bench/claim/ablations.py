"""Design C: what credit and second opinion rest on. Design A's differences, with one part of the training changed.

an oracle critic          values are means of continuations by the policy itself, so that no critic errs
no critic                 `--advantage q`: the token reward is an advantage already, the score is centred by RLOO; its
                          rivals are RLOO on the score alone, and on DDPO's sum
a poorer reward model     learnt from a quarter of the pairs, the DPO model as it is
a poorer DPO model        the other way round
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.claim.cells import OTHER_PAIRS, VALUE_SAMPLES, Cell, other_world

METHODS = ("PPO", "RTO", "DDPO")
FEW_PAIRS = 250

Change = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Ablation:
    """One part of the training, changed in METHODS alike."""

    name: str
    change: Change = ()
    """Of each method."""
    own: Mapping[str, Change] = field(default_factory=dict)
    """Method -> what it changes beside."""
    untouched: tuple[str, ...] = ()
    """Methods that have no such part: theirs are design A's cells."""

    def changed(self, method: str) -> Change:
        return () if method in self.untouched else self.change + self.own.get(method, ())


def ablations(value_samples: int) -> tuple[Ablation, ...]:
    """Those of design C; value_samples: continuations of each token."""
    group: Change = (("responses_per_prompt", 4),)
    return (
        Ablation("as in design A"),
        Ablation("no critic", group, {
            "PPO": (("advantage", "rloo"),), "RTO": (("advantage", "q"),), "DDPO": (("advantage", "rloo"),),
        }),
        Ablation(f"reward model of {FEW_PAIRS} pairs", (("rm_pairs", FEW_PAIRS),)),
        Ablation(f"DPO model of {FEW_PAIRS} pairs", (("dpo_pairs", FEW_PAIRS),), untouched=("PPO",)),
        Ablation(f"oracle critic, {value_samples} continuations", ((VALUE_SAMPLES, value_samples),)),  # takes longest
    )  # fmt: skip


def worlds(cells: Iterable[Cell]) -> list[Cell]:
    """What must be trained before: the worlds whose models these cells borrow."""
    found = [other_world(c, pairs) for c in cells for name, pairs in c.change if name in OTHER_PAIRS]
    return list(dict.fromkeys(found))
