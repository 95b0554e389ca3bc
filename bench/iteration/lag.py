"""RTO on the embedded task with rollouts of one iteration before (`--rollout-lag 1`) against none, over seeds.

.venv-vllm/bin/python -m bench.iteration.lag --seeds 0 1 2 3 4    # what is not there yet, into bench/results/lag/
python -m bench.iteration.lag --engine thread --demos runs/demo_seeds    # without vLLM, on models the demo has left

Both arms sample with the same engine; they differ in the lag alone (and in that a lagging run takes the sampler's
log-probs for the behaviour's). SFT, reward model and DPO model are the demo's, of the same seed. `--engine thread` is
the transformers engine in a thread of the training process: a recipe refuses that, since nothing is gained by it, but
the lag is the same, so that it shows what the lag does to the reward (its seconds say nothing).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import torch
import tyro

from rto_fast import build, trainer
from rto_fast.demo.config import DemoConfig
from rto_fast.demo.judge import Truth, sample, true_rewards
from rto_fast.demo.pipeline import rl_config, run
from rto_fast.demo.tiny_task import make_task
from rto_fast.logs.files import METRICS, read_metrics, write_atomic
from rto_fast.rollout.transformers_engine import TransformersEngine
from rto_fast.rollout.vllm_engines.servers import VLLMServeEngine

ROOT = Path(__file__).parents[2]
LAGS = (0, 1)


@dataclass(frozen=True)
class LagConfig:
    """Runs RTO with and without a lag for each seed."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the demo; each is reported, whatever it gives."""
    iterations: int = 40
    """Rollouts of each arm."""
    engine: Literal["vllm-serve", "thread"] = "vllm-serve"
    """What samples."""
    demos: str = ""
    """Folder of finished demos, seed0, seed1 ...; empty = make them (with heads that vLLM on a CPU has)."""
    runs: str = "runs/lag"
    """Folder of the runs; what is finished is not run again."""
    out: str = "bench/results/lag/lag.json"
    """Results."""


def prepared(config: LagConfig, seed: int) -> tuple[DemoConfig, Path]:
    """A demo's settings and folder, with everything up to the DPO model in it (and arms of one iteration)."""
    if config.demos:
        root = ROOT / config.demos / f"seed{seed}"
        there = json.loads((root / "demo.json").read_text()) | {"output_dir": str(root)}
        return dataclasses.replace(DemoConfig(**there), iterations=config.iterations), root
    root = ROOT / config.runs / f"seed{seed}"
    short = DemoConfig(output_dir=str(root), seed=seed, heads=2, iterations=1)
    if not (root / "results.json").exists():
        run(short)
    return dataclasses.replace(short, iterations=config.iterations), root


def run_arm(config: DemoConfig, root: Path, out: Path, url: tuple[str, ...], lag: int) -> dict[str, float]:
    """Trains an arm; true reward on newly drawn prompts, mean over the last quarter of training, seconds."""
    task = make_task(config.seed, config.difficulty)
    settings = dataclasses.replace(
        rl_config(config, root, "RTO"), output_dir=str(out / f"lag{lag}"), rollout_engine="vllm-serve",
        vllm_url=url, rollout_lag=lag, log_every=1, save_every=0, resume="never", vllm_max_sequences=64,
    )  # fmt: skip
    trainer.train(settings, Truth(task))
    rows = read_metrics(out / f"lag{lag}" / METRICS)
    prompts = [row["prompt"] for row in task.prompts(config.eval_prompts, seed=4)]
    rewards = true_rewards(task, sample(task, config, out / f"lag{lag}" / "policy", prompts, run_seed=3))
    late = rows[-(len(rows) // 4) :]
    seconds = {name: sum(r.get(f"time/{name}_s", 0.0) for r in rows) for name in ("rollout", "score", "train", "sync")}
    return {
        "true_reward": mean(rewards),
        "late_true_reward": mean(r["true/reward"] for r in late),
        "late_kl": mean(r["kl/response"] for r in late),
        "seconds": rows[-1]["run/elapsed_s"],
        **{f"{name}_s": value for name, value in seconds.items()},
    }


def main(config: LagConfig) -> None:
    torch.set_num_threads(1)
    if config.engine == "thread":
        build.make_engine = lambda _, path, *how: TransformersEngine(path, *how[:3])
    results: dict[str, dict[str, dict[str, float]]] = {}
    server = None
    for seed in config.seeds:
        settings, root = prepared(config, seed)
        done = ROOT / config.runs / f"seed{seed}" / f"{config.engine}_{config.iterations}.json"
        if not done.exists() and config.engine == "vllm-serve":
            server = server or VLLMServeEngine(
                root / "sft" / "model", "cpu", torch.float32, folder=ROOT / config.runs, max_sequences=64,
                max_length=32 + settings.max_response_length,
            )  # fmt: skip
        if not done.exists():
            urls = tuple(server.urls) if server else ()
            arms = {str(lag): run_arm(settings, root, done.parent, urls, lag) for lag in LAGS}
            write_atomic(done, json.dumps(arms, indent=1) + "\n")
        results[str(seed)] = json.loads(done.read_text())
        print(f"seed {seed}: {results[str(seed)]}", flush=True)
    if server:
        server.close()
    record = {"settings": dataclasses.asdict(config), "seeds": results}
    write_atomic(ROOT / config.out, json.dumps(record, indent=1) + "\n")
    print(table(results))


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: a row a seed, then means with the standard deviation over seeds."""
    lines = ["| seed | lag 0 | lag 1 | difference | s, lag 0 | s, lag 1 |", "|---|---|---|---|---|---|"]
    columns: list[list[float]] = [[], [], [], [], []]
    for seed, arms in results.items():
        rewards, seconds = ([arms[str(lag)][key] for lag in LAGS] for key in ("true_reward", "seconds"))
        row = [*rewards, rewards[1] - rewards[0], *seconds]
        lines.append(f"| {seed} | " + " | ".join(f"{x:.2f}" for x in row) + " |")
        for column, x in zip(columns, row, strict=True):
            column.append(x)
    if len(results) > 1:
        cells = " | ".join(f"{mean(c):.2f} ± {stdev(c):.2f}" for c in columns)
        lines.append(f"| mean ± sd | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(LagConfig, description=LagConfig.__doc__))
