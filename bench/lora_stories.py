"""SFT, reward model, DPO and RTO with adapters, on the 0.8M-parameter story model and real pairs; one table.

python -m bench.lora_stories                                           # adapters of rank 16, transformers engine
python -m bench.lora_stories --runs runs/whole_stories --rank 0        # whole weights at a tenth of the rates
python -m bench.lora_stories --runs runs/lora_stories_vllm --engine vllm

A stage whose folder is whole is not run again, one that was stopped goes on; the table is written at the end. A folder
of other settings is refused. Needs the model and the pairs beside the checkout (../shared).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.claim.grid import of_one_size
from rto_fast.errors import ConfigError, shown
from rto_fast.logs.files import METRICS, read_metrics, write_atomic

SHARED = Path(__file__).parents[2] / "shared"
MODEL, PAIRS = SHARED / "models" / "stories1m", SHARED / "data" / "story_preferences.jsonl"
RATES = {"sft": {"lr": 2e-3}, "rm": {"lr": 1e-3}, "dpo": {"lr": 2e-3}, "rto": {"policy_lr": 3e-4, "critic_lr": 1e-2}}
"""Of adapters; whole weights get a tenth."""
SUPERVISED = {
    "data": PAIRS, "dtype": "fp32", "batch": 32, "max_length": 256, "eval_split": "", "gradient_checkpointing": False,
    "data_workers": 1, "data_split": "train", "invalid_rows": "skip_empty",
}  # fmt: skip
LOOP = {
    "data": PAIRS, "data_split": "train", "prompt_key": "prompt", "dtype": "fp32", "rollout_batch": 128,
    "train_batch": 32, "max_prompt_length": 48, "max_response_length": 48, "beta1": 0.1, "dpo_clip": 0.1,
    "gradient_checkpointing": False, "data_workers": 1, "report": False,
}  # fmt: skip
FIGURES = {
    "sft": ["eval/loss"], "rm": ["eval/accuracy"], "dpo": ["eval/accuracy"],
    "rto": ["reward/score", "reward/dpo", "kl/response"],
}  # fmt: skip
"""Metrics of a stage that the table shows."""


def stages(runs: Path, rank: int, engine: str, iterations: int) -> dict[str, dict[str, Any]]:
    """Each stage's flags, in order."""
    tuned: dict[str, dict[str, Any]] = {}
    for name, rates in RATES.items():
        own = {f"lora_{k}" if rank else k: v if rank else v / 10 for k, v in rates.items()}
        tuned[name] = own | {"output_dir": runs / name, "resume": "auto"} | ({"lora_rank": rank} if rank else {})
    sft = runs / "sft" / "model"
    tuned["sft"] |= SUPERVISED | {"model": MODEL, "response_key": "chosen"}
    tuned["rm"] |= SUPERVISED | {"model": MODEL}
    tuned["dpo"] |= SUPERVISED | {"model": sft}
    tuned["rto"] |= LOOP | {
        "policy": sft, "dpo_model": runs / "dpo" / "model", "reward_model": runs / "rm" / "model",
        "rollout_engine": engine, "iterations": iterations,
    }  # fmt: skip
    return tuned


def flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def run(name: str, settings: dict[str, Any]) -> None:
    """Runs a stage where its models are not there yet; SystemExit where it fails."""
    done = Path(settings["output_dir"]) / ("policy" if name == "rto" else "model")
    if done.is_dir():
        return
    found = subprocess.run([sys.executable, "-m", "rto_fast", name, *flags(settings)], check=False)
    if found.returncode:
        sys.exit(found.returncode)


def table(runs: Path) -> str:
    """First and last value of each stage's figures, and the bytes of what it wrote."""
    lines = ["| stage | figure | first | last | weights written, KB |", "|---|---|---|---|---|"]
    for name, figures in FIGURES.items():
        rows = read_metrics(runs / name / METRICS)
        folder = runs / name / ("policy" if name == "rto" else "model")
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 1000
        for figure in figures:
            seen = [row[figure] for row in rows if figure in row]
            lines.append(f"| {name} | {figure} | {seen[0]:.4g} | {seen[-1]:.4g} | {size:.0f} |")
    return "\n".join(lines) + "\n"


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/lora_stories"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--iterations", type=int, default=20)
    asked = parser.parse_args(args)
    if not MODEL.is_dir() or not PAIRS.is_file():
        raise ConfigError(f"no {MODEL} and {PAIRS}")
    sizes = {"rank": asked.rank, "engine": asked.engine, "iterations": asked.iterations}
    of_one_size(asked.runs, "stages", sizes)
    for name, settings in stages(asked.runs, asked.rank, asked.engine, asked.iterations).items():
        run(name, settings)
    write_atomic(asked.runs / "table.md", table(asked.runs))
    print(table(asked.runs))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        sys.exit(2)
