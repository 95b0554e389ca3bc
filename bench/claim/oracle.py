"""The tilting oracle's lines: the best true reward that a KL penalty allows to each reward, without any RL.

    python -m bench.claim.oracle --tasks medium --seeds 0 1    # trains what the tasks share, if it is not there

`bench/claim/tilting.py` says what is estimated and how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.claim import grid, other_tasks, stories
from bench.claim.cells import oracle_cell
from bench.claim.report import markdown, shown
from bench.claim.tilting import REWARDS
from rto_fast.demo.tiny_task import DIFFICULTIES
from rto_fast.errors import require


def table(results: Sequence[dict[str, Any]], at: Sequence[float] = (1, 2, 3, 4, 6, 8)) -> str:
    """Markdown: true reward of each tilted model at some KL, mean over seeds; the fewest effective samples behind."""
    rows = []
    for name in REWARDS:
        row = [name]
        for kl in at:
            points = [p for r in results for p in r["oracle"][name] if abs(p["kl"] - kl) < 0.02 * kl]
            row.append(f"{shown([p['true_reward'] for p in points])} ({min(p['ess'] for p in points):.0f})"
                       if len(points) == len(results) else "")  # fmt: skip
        rows.append(row)
    return markdown(("tilted by", *(f"{kl:g} nats" for kl in at)), rows)


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """The tilting oracle's lines."""

    tasks: tuple[str, ...] = ("medium",)
    """As in bench.claim.grid."""
    seeds: tuple[int, ...] = (0,)
    """Each has a line of its own."""
    prompts: int = 32
    """Evaluation prompts."""
    each: int = 512
    """Responses to each of the SFT model, and as many of the DPO model."""
    runs: str = "runs/claim"
    """Folder of bench.claim.grid's cells: what is there is not trained again."""

    def validate(self) -> None:
        require(bool(self.seeds), "seeds: at least one is needed")
        known = ", ".join((*DIFFICULTIES, *other_tasks.TASKS, *stories.TASKS))
        wrong = [t for t in self.tasks if grid.unknown(t)]
        require(not wrong, f"tasks: unknown {', '.join(wrong)}; choose from {known}, or one with pairs, as medium-250")
        for name in ("prompts", "each"):
            require(getattr(self, name) > 0, f"{name}: must be positive, got {getattr(self, name)}")


def main(config: OracleConfig) -> None:
    config.validate()
    settings = grid.ClaimConfig(runs=config.runs)
    with grid.opened(settings, grid.ROOT / config.runs) as cells:
        wanted = {t: [oracle_cell(t, s, config.prompts, config.each) for s in config.seeds] for t in config.tasks}
        cells.run("oracle", [c for of_task in wanted.values() for c in of_task])
    for task, of_task in wanted.items():
        print(f"\n{task}, seeds {', '.join(map(str, config.seeds))}: true reward (fewest effective samples a prompt)\n")
        print(table([cells.found[c] for c in of_task]))


if __name__ == "__main__":
    grid.by_flags(main, OracleConfig, __doc__)
