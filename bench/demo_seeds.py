"""The demo over several seeds: every seed's table, curves with means, and the section of docs/results/demo.md.

python bench/demo_seeds.py --seeds 0 1 2 3 4        # runs what is not there yet, then writes bench/results/demo.*
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from rto_fast.demo.config import ARMS
from rto_fast.demo.pipeline import truth_curve
from rto_fast.logs.files import METRICS, read_metrics, write_atomic

ROOT = Path(__file__).parents[1]
COLOURS = {"SFT": "#888888", "DPO": "#2a9d5c", "PPO": "#d1690f", "RTO": "#1f5fbf"}


@dataclass(frozen=True)
class SeedsConfig:
    """Runs the demo for each seed and reports all of them."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds; each is run once and reported, whatever it gives."""
    runs: str = "runs/demo_seeds"
    """Folder of the runs; finished seeds are not run again."""
    out: str = "bench/results/demo/seeds"
    """Results: OUT.json, OUT.svg; with --page the section of docs/results/demo.md."""
    jobs: int = 1
    """Seeds run at the same time."""
    flags: tuple[str, ...] = ()
    """Flags for recipes/rto_tiny.py, each as one word, such as flags=--iterations=20."""
    page: bool = False
    """Write the section of docs/results/demo.md."""


def run_seed(config: SeedsConfig, seed: int) -> Path:
    folder = ROOT / config.runs / f"seed{seed}"
    if not (folder / "results.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "recipes/rto_tiny.py", "--seed", str(seed), "--output-dir", str(folder)]
        threads = str(max(1, len(os.sched_getaffinity(0)) // config.jobs))
        with open(folder.parent / f"seed{seed}.log", "w") as log:
            subprocess.run(
                [*command, *config.flags], cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": threads},
            )  # fmt: skip
        print(f"seed {seed}: done", flush=True)
    return folder


def draw(folders: list[Path], results: list[dict], path: Path) -> None:
    """True reward against samples and against KL: thin lines are seeds, thick ones their mean."""
    plt.rcParams.update({"svg.fonttype": "path", "font.size": 9})
    fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.2), constrained_layout=True)
    for axis, x in zip(axes, ("samples", "kl/response"), strict=True):
        for arm in ARMS:
            curves = [truth_curve(arm, read_metrics(f / arm.lower() / METRICS), x) for f in folders]
            for curve in curves:
                axis.plot(curve.x, curve.y, color=COLOURS[arm], linewidth=0.7, alpha=0.35)
            axis.plot(
                [mean(c.x[i] for c in curves) for i in range(len(curves[0].x))],
                [mean(c.y[i] for c in curves) for i in range(len(curves[0].y))],
                color=COLOURS[arm], linewidth=2, label=arm,
            )  # fmt: skip
        for name in ("SFT", "DPO"):
            level = mean(r[name]["true_reward"] for r in results)
            axis.axhline(level, color=COLOURS[name], linestyle="--", linewidth=1, label=name)
        axis.set_ylabel("true reward")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xlabel("responses drawn")
    axes[1].set_xlabel("KL to SFT, nats a response")
    axes[0].legend(frameon=False)
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def table(seeds: tuple[int, ...], results: list[dict]) -> str:
    """Markdown: a row a seed, then means with the standard deviation over seeds."""
    names = list(results[0])
    lines = [
        "| seed | " + " | ".join(names) + " | RTO − PPO | KL (PPO, RTO) | win rate against SFT (DPO, PPO, RTO) |",
        "|---|" + "---|" * (len(names) + 3),
    ]
    for seed, r in zip(seeds, results, strict=True):
        cells = [f"{r[n]['true_reward']:.2f}" for n in names]
        gap = r["RTO"]["true_reward"] - r["PPO"]["true_reward"]
        kl = ", ".join(f"{r[n]['kl']:.1f}" for n in ARMS)
        wins = ", ".join(f"{100 * r[n]['win_rate']:.0f} %" for n in ("DPO", *ARMS))
        lines.append(f"| {seed} | " + " | ".join(cells) + f" | {gap:+.2f} | {kl} | {wins} |")
    means = [[r[n]["true_reward"] for r in results] for n in names]
    gaps = [r["RTO"]["true_reward"] - r["PPO"]["true_reward"] for r in results]
    spread = (lambda v: f"{mean(v):.2f} ± {stdev(v):.2f}") if len(results) > 1 else (lambda v: f"{v[0]:.2f}")
    lines.append("| mean ± sd | " + " | ".join(map(spread, means)) + f" | {spread(gaps)} | | |")
    return "\n".join(lines)


def main(config: SeedsConfig) -> None:
    with ThreadPoolExecutor(config.jobs) as pool:
        folders = list(pool.map(lambda seed: run_seed(config, seed), config.seeds))
    results = [json.loads((f / "results.json").read_text()) for f in folders]
    settings = json.loads((folders[0] / "demo.json").read_text())
    out = ROOT / config.out
    out.parent.mkdir(parents=True, exist_ok=True)
    command = "python bench/demo_seeds.py --seeds " + " ".join(map(str, config.seeds))
    record = {"command": command, "settings": settings, "seeds": dict(zip(config.seeds, results, strict=True))}
    write_atomic(out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    draw(folders, results, out.with_suffix(".svg"))
    text = table(config.seeds, results)
    print(text)
    if config.page:
        page = ROOT / "docs" / "results" / "demo.md"
        start, end = "<!-- demo -->", "<!-- /demo -->"
        head, rest = page.read_text().split(start)
        samples = settings["iterations"] * settings["rollout_batch"]
        seeds = ", ".join(map(str, config.seeds))
        section = (
            f"\n`make demo` on seeds {seeds} (`{command}`), judged by the task's true token reward on\n"
            f"{settings['eval_prompts']} newly drawn prompts. RTO and PPO draw {samples:,} samples each and differ in\n"
            f"beta1 alone; DPO draws none. True reward of a response:\n\n{text}\n\n"
            f"![True reward against samples and against KL]({os.path.relpath(out, page.parent)}.svg)\n"
        )
        write_atomic(page, head + start + section + end + rest.split(end)[1])


if __name__ == "__main__":
    main(tyro.cli(SeedsConfig, description=SeedsConfig.__doc__))
