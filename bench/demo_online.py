"""Online token rewards on the demo's seeds, beside its frozen one: the second section of docs/results/demo.md.

python bench/demo_online.py --seeds 0 1 2 3 4 --page        # after bench/demo_seeds.py, on its runs
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import tyro

from rto_fast import distributed, trainer
from rto_fast.config import RTOConfig
from rto_fast.demo.config import DemoConfig
from rto_fast.demo.judge import Truth, task_judge
from rto_fast.demo.pipeline import rl_config
from rto_fast.demo.tiny_task import make_task
from rto_fast.logs.files import METRICS, read_metrics, write_atomic

ROOT = Path(__file__).parents[1]
MARKS = ("<!-- online -->", "<!-- /online -->")
ONLINE: dict[str, dict[str, Any]] = {
    "online RTO": {"online": "dpo", "responses_per_prompt": 2},
    "PRIME": {"online": "prime"},
}
"""Arms; both leave the number of responses and all that is not named here as the demo's RTO has it."""


@dataclass(frozen=True)
class OnlineConfig:
    """Runs the online arms for each seed that the demo has done, and reports all of them."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds; each is run once and reported, whatever it gives."""
    runs: str = "runs/demo_seeds"
    """Folder of the demo's runs; finished arms are not run again."""
    online_lr: float = 1e-4
    """Peak learning rate of the DPO model."""
    out: str = "bench/results/demo/online.json"
    """Results; with --page also the section of docs/results/demo.md."""
    page: bool = False
    """Write the section of docs/results/demo.md."""


def settings_of(config: OnlineConfig, demo: DemoConfig, root: Path, arm: str) -> RTOConfig:
    """The demo's RTO with an online token reward: PRIME starts from the SFT model, online RTO from the DPO model."""
    changes = ONLINE[arm]
    start = root / ("sft" if arm == "PRIME" else "dpo") / "model"
    return dataclasses.replace(
        rl_config(demo, root, "RTO"), dpo_model=(str(start),), online_lr=config.online_lr, online_beta=demo.dpo_beta,
        rollout_batch=demo.rollout_batch // changes.get("responses_per_prompt", 1), report=False,
        output_dir=str(root / arm.lower().replace(" ", "_")), **changes,
    )  # fmt: skip


def run_seed(config: OnlineConfig, seed: int) -> dict[str, dict[str, float]]:
    """The judgements of the demo's own arms, and of those that are online with their accuracy by halves of the run."""
    root = ROOT / config.runs / f"seed{seed}"
    demo = DemoConfig(**json.loads((root / "demo.json").read_text()) | {"output_dir": str(root)})
    found = json.loads((root / "results.json").read_text())
    task = make_task(demo.seed, demo.difficulty)
    judge = task_judge(task, demo, root)
    for arm in ONLINE:
        settings = settings_of(config, demo, root, arm)
        folder = Path(settings.output_dir)
        if not (folder / "policy").exists():
            trainer.train(settings, Truth(task))
        right = [row["online/accuracy"] for row in read_metrics(folder / METRICS)]
        half = len(right) // 2
        found[arm] = dataclasses.asdict(judge(folder / "policy"))
        found[arm] |= {"accuracy_first": mean(right[:half]), "accuracy_second": mean(right[half:])}
        print(f"seed {seed}, {arm}: {found[arm]}", flush=True)
    return found


def table(seeds: tuple[int, ...], results: list[dict[str, dict[str, float]]]) -> str:
    """Markdown: a row a seed, then means with the standard deviation over seeds."""
    arms = ("RTO", *ONLINE)
    lines = [
        "| seed | RTO, frozen | " + " | ".join(ONLINE) + f" | KL ({', '.join(arms)}) | accuracy of halves "
        f"({', '.join(ONLINE)}) |",
        "|---|" + "---|" * (len(arms) + 2),
    ]
    for seed, r in zip(seeds, results, strict=True):
        rewards = " | ".join(f"{r[arm]['true_reward']:.2f}" for arm in arms)
        kl = ", ".join(f"{r[arm]['kl']:.1f}" for arm in arms)
        right = "; ".join(f"{r[a]['accuracy_first']:.2f}, {r[a]['accuracy_second']:.2f}" for a in ONLINE)
        lines.append(f"| {seed} | {rewards} | {kl} | {right} |")
    columns = [[r[arm]["true_reward"] for r in results] for arm in arms]
    spread = [f"{mean(c):.2f} ± {stdev(c):.2f}" if len(c) > 1 else f"{c[0]:.2f}" for c in columns]
    kl = ", ".join(f"{mean(r[arm]['kl'] for r in results):.1f}" for arm in arms)
    lines.append(f"| mean ± sd | {' | '.join(spread)} | {kl} | |")
    return "\n".join(lines)


def main(config: OnlineConfig) -> None:
    distributed.init()
    torch.set_num_threads(1)
    results = [run_seed(config, seed) for seed in config.seeds]
    command = "python bench/demo_online.py --seeds " + " ".join(map(str, config.seeds))
    record = {"command": command, "online_lr": config.online_lr, "arms": ONLINE,
              "seeds": dict(zip(config.seeds, results, strict=True))}  # fmt: skip
    write_atomic(ROOT / config.out, json.dumps(record, indent=1) + "\n")
    text = table(config.seeds, results)
    print(text)
    if config.page:
        page, (start, end) = ROOT / "docs" / "results" / "demo.md", MARKS
        head, rest = page.read_text().split(start)
        write_atomic(page, head + start + f"\n`{command}`. True reward of a response:\n\n{text}\n" + end
                     + rest.split(end)[1])  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(OnlineConfig, description=OnlineConfig.__doc__))
