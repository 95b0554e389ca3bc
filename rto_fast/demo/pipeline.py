"""The whole job on the embedded task, from nothing.

SFT -> preferences -> reward model -> DPO -> RTO and PPO.

RTO and PPO run the same loop with the same reward model, learning rates, seeds and number of samples; only
beta1 differs (0 is PPO). The task's token reward is known, so all models are judged by the truth.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as ConsoleTable

from rto_fast import distributed, trainer
from rto_fast.config import DPOConfig, RMConfig, RTOConfig, SFTConfig
from rto_fast.demo.config import ARMS, DemoConfig
from rto_fast.demo.judge import Judgement, Truth, judge, sample
from rto_fast.demo.tiny_task import POSITIONS, TinyTask, make_task
from rto_fast.errors import ConfigError
from rto_fast.logs.files import METRICS, SAMPLES, json_line, read_metrics, write_atomic
from rto_fast.report.charts import Chart, Curve
from rto_fast.report.page import Table, write_report
from rto_fast.report.samples import read_samples
from rto_fast.supervised.dpo import train_dpo
from rto_fast.supervised.reward_model import train_rm
from rto_fast.supervised.sft import train_sft

MAX_PROMPT = 32
"""Tokens."""


def run(config: DemoConfig) -> dict[str, Judgement]:
    """Trains everything that is not there yet, judges it, prints the table and writes `report.html`."""
    if distributed.init().type == "cpu":
        torch.set_num_threads(1)  # models this small lose more to a second thread's start than they gain
    root = Path(config.output_dir)
    _open(root, config)
    task = make_task(config.seed, config.difficulty)
    console = Console(quiet=distributed.rank() != 0)
    prepare(task, config, root, console)
    for arm in ARMS:
        observe = Truth(task)
        _stage(console, root, 6, f"{arm}: {config.iterations} rollouts of {config.rollout_batch}", arm.lower(),
               lambda arm=arm, observe=observe: trainer.train(rl_config(config, root, arm), observe))  # fmt: skip

    found = judge(task, config, root)
    if distributed.rank() == 0:
        _show(console, config, root, found)
    distributed.barrier()
    return found


def prepare(task: TinyTask, config: DemoConfig, root: Path, console: Console) -> None:
    """Everything that RTO and PPO share, from the random model to DPO; what is there already stays."""
    for number, (title, name, make) in enumerate((
        ("a random model and a corpus", "data", lambda: _first_data(task, config, root)),
        ("supervised fine-tuning", "sft", lambda: train_sft(_sft(config, root))),
        ("preference pairs from the SFT model's own samples", "pairs", lambda: _first_pairs(task, config, root)),
        ("reward model", "rm", lambda: train_rm(rm_config(config, root))),
        ("DPO, the token reward's source", "dpo", lambda: train_dpo(dpo_config(config, root))),
    ), 1):  # fmt: skip
        _stage(console, root, number, title, name, make)


def _stage(console: Console, root: Path, number: int, title: str, name: str, make: Callable[[], object]) -> None:
    console.rule(f"[bold]{number}/6  {title}")
    exported = name in ("sft", "rm", "dpo") and (root / name / "model").exists()  # killed before it was noted
    if exported or (root / name / "done").exists():
        console.print(f"{root / name} is there already")
        return
    make()
    distributed.barrier()
    if distributed.rank() == 0:
        (root / name / "done").touch()
    distributed.barrier()


def max_length(config: DemoConfig) -> int:
    """Tokens of a prompt and a response at most, the models' positions."""
    return max(POSITIONS, MAX_PROMPT + config.max_response_length)


def _common(config: DemoConfig, root: Path, name: str) -> dict[str, Any]:
    return {
        "output_dir": str(root / name), "seed": config.seed, "dtype": "fp32", "gradient_checkpointing": False,
        "resume": "auto", "data_cache": False, "warmup_ratio": 0.03,
    }  # fmt: skip


def _sft(config: DemoConfig, root: Path) -> SFTConfig:
    return SFTConfig(
        model=str(root / "data" / "model"), data=str(root / "data" / "corpus.jsonl"), lr=config.sft_lr, batch=32,
        epochs=config.stage_epochs, max_length=max_length(config), log_every=25, **_common(config, root, "sft"),
    )  # fmt: skip


def rm_config(config: DemoConfig, root: Path) -> RMConfig:
    """The settings of the reward model."""
    return RMConfig(
        model=str(root / "sft" / "model"), data=str(root / "pairs" / "pairs.jsonl"), lr=config.rm_lr,
        batch=config.rm_batch, epochs=config.rm_epochs, max_length=max_length(config), eval_fraction=0.1, log_every=25,
        **_common(config, root, "rm"),
    )  # fmt: skip


def dpo_config(config: DemoConfig, root: Path) -> DPOConfig:
    """The settings of the token reward's source."""
    return DPOConfig(
        model=str(root / "sft" / "model"), data=str(root / "pairs" / "pairs.jsonl"), lr=config.dpo_lr, batch=32,
        epochs=config.stage_epochs, max_length=max_length(config), eval_fraction=0.1, log_every=25,
        beta=config.dpo_beta,
        **_common(config, root, "dpo"),
    )  # fmt: skip


def rl_config(config: DemoConfig, root: Path, arm: str) -> RTOConfig:
    """The settings of an arm; the two differ in beta1 (and the DPO model that beta1 = 0 never loads)."""
    token_reward = {"beta1": config.beta1, "dpo_model": str(root / "dpo" / "model")} if arm == "RTO" else {"beta1": 0.0}
    return RTOConfig(
        policy=str(root / "sft" / "model"), reward_model=(str(root / "rm" / "model"),),
        data=str(root / "data" / "prompts.jsonl"), iterations=config.iterations,
        rollout_batch=config.rollout_batch, train_batch=config.train_batch, max_prompt_length=MAX_PROMPT,
        max_response_length=config.max_response_length, policy_lr=config.policy_lr, critic_lr=config.critic_lr,
        dpo_clip=config.dpo_clip, beta2=config.beta2, save_every=max(1, config.iterations // 4), keep_last=1,
        log_every=5, rollout_engine="transformers",  # faster for tiny models: bench/iteration/bench_rollout.py
        **token_reward, **_common(config, root, arm.lower()),
    )  # fmt: skip


def _open(root: Path, config: DemoConfig) -> None:
    """Makes the folder, or checks that it is of the same demo."""
    path, mine = root / "demo.json", dataclasses.asdict(config) | {"output_dir": ""}
    if path.exists():
        theirs = json.loads(path.read_text())
        changed = [k for k in mine if theirs.get(k) != mine[k]]
        if changed:
            what = ", ".join(f"{k}={theirs.get(k)!r} (now {mine[k]!r})" for k in changed)
            raise ConfigError(f"output_dir: {root} holds a demo with other settings: {what}; use another --output-dir")
    elif root.is_dir() and any(root.iterdir()):
        raise ConfigError(f"output_dir: {root} holds something else; use another --output-dir")
    distributed.barrier()
    if distributed.rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(mine, indent=2) + "\n")
    distributed.barrier()


def _first_data(task: TinyTask, config: DemoConfig, root: Path) -> None:
    if distributed.rank() == 0:
        task.save_model(root / "data" / "model", config.seed, config.heads, max_length(config))
        _write(root / "data" / "corpus.jsonl", task.texts(config.corpus_rows, seed=1))
        _write(root / "data" / "prompts.jsonl", task.prompts(config.prompts, seed=2))


def _first_pairs(task: TinyTask, config: DemoConfig, root: Path) -> None:
    if distributed.rank() == 0:
        _write(root / "pairs" / "pairs.jsonl", sampled_pairs(task, config, root / "sft" / "model"))


def sampled_pairs(task: TinyTask, config: DemoConfig, model: Path, seed: int = 3) -> list[dict[str, str]]:
    """Two samples of a model to each of `config.pairs` prompts, preferred by Bradley-Terry on the true reward.

    seed: of the prompts.
    """
    prompts = [row["prompt"] for row in task.prompts(config.pairs, seed=seed)]
    first, second = (sample(task, config, model, prompts, run_seed) for run_seed in (1, 2))
    texts = [
        task.tokenizer.batch_decode([r.tolist() for r in rollout.responses()], skip_special_tokens=True)
        for rollout in (first, second)
    ]
    rng = random.Random(f"pairs/{config.seed}")
    return [task.preference(p, a, b, rng) for p, a, b in zip(prompts, *texts, strict=True) if a and b and a != b]


def _show(console: Console, config: DemoConfig, root: Path, found: dict[str, Judgement]) -> None:
    """The table on the console, `results.json` and `report.html`."""
    samples = config.iterations * config.rollout_batch
    columns = ("model", "true reward", "KL to SFT, nats", "win rate against SFT", "length", "samples drawn")
    rows = [
        (
            name,
            f"{j.true_reward:.2f}",
            f"{j.kl:.2f}".replace("-0.00", "0.00"),
            f"{100 * j.win_rate:.0f} %",
            f"{j.length:.1f}",
            f"{samples:,}" if name in ARMS else "-",
        )
        for name, j in found.items()
    ]
    console.rule("[bold]Results")
    table = ConsoleTable(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    write_atomic(
        root / "results.json", json.dumps({n: dataclasses.asdict(j) for n, j in found.items()}, indent=2) + "\n"
    )
    curves = {arm: read_metrics(root / arm.lower() / METRICS) for arm in ARMS}
    levels = [Curve(name, (), (found[name].true_reward,)) for name in ("SFT", "DPO")]
    charts = [
        Chart("True reward against samples", [*levels, *(truth_curve(arm, r, "samples") for arm, r in curves.items())],
              "responses drawn", "true reward", "Mean of a rollout, averaged over five iterations."),
        Chart("True reward against KL", [truth_curve(arm, r, "kl/response") for arm, r in curves.items()],
              "KL to SFT, nats a response", "true reward", "The same points, placed by how far the policy has moved."),
    ]  # fmt: skip
    shown = []
    for arm in reversed(ARMS):
        kept = read_samples(root / arm.lower() / SAMPLES)
        shown += [dataclasses.replace(s, label=arm) for s in kept[:2] + kept[-6:]]
    path = write_report(
        root / "report.html", title="RTO against PPO on the embedded task",
        subtitle=f"Seed {config.seed}, {config.difficulty}, {samples:,} samples each; the same reward model, "
        "learning rates and prompts.",
        summary={f"{n}: true reward": f"{j.true_reward:.2f}" for n, j in found.items()},
        tables=[Table("Judged by the true reward on newly drawn prompts", columns, rows,
                      "DPO draws no samples.", best=max(range(len(rows)), key=lambda i: float(rows[i][1])))],
        comparison=charts, metrics=curves["RTO"], samples=shown, settings=dataclasses.asdict(config),
    )  # fmt: skip
    console.print(f"report: {path}")


def truth_curve(name: str, rows: Sequence[dict], x: str, window: int = 5) -> Curve:
    """True reward of an arm's metrics against `x`, both averaged over `window` iterations."""
    rows = [r for r in rows if r.get("true/reward") is not None and r.get(x) is not None]
    groups = [rows[i : i + window] for i in range(0, len(rows), window)]
    xs = [g[-1][x] if x == "samples" else math.fsum(r[x] for r in g) / len(g) for g in groups]
    return Curve(name, xs, [math.fsum(r["true/reward"] for r in g) / len(g) for g in groups])


def _write(path: Path, rows: Sequence[dict]) -> None:
    write_atomic(path, "".join(map(json_line, rows)))
