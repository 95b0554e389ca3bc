"""The whole job on the embedded task, from nothing: SFT -> preferences -> reward model -> DPO -> RTO and PPO.

RTO and PPO run the same loop with the same reward model, learning rates, seeds and number of samples; only
beta1 differs (0 is PPO). The task's token reward is known, so all models are judged by the truth.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table as ConsoleTable
from transformers import PreTrainedTokenizerBase

from rto_fast import distributed, runfiles, trainer
from rto_fast.config import DPOConfig, RMConfig, RTOConfig, SFTConfig
from rto_fast.contract import Request, ResponseTexts, Rollout
from rto_fast.curves import Chart, Curve
from rto_fast.data.chat_template import load_template
from rto_fast.data.tokenizer import stop_token_ids
from rto_fast.errors import ConfigError
from rto_fast.models.attention import resolve_attention
from rto_fast.models.heads import PolicyModel
from rto_fast.models.load import load_policy
from rto_fast.models.packing import Placement
from rto_fast.report import Table, write_report
from rto_fast.rollout.engine import Sampling, sample_seed
from rto_fast.rollout.transformers_engine import TransformersEngine
from rto_fast.supervised.dpo import train_dpo
from rto_fast.supervised.reward_model import train_rm
from rto_fast.supervised.sft import train_sft
from rto_fast.tiny_task import TinyTask, make_task

ARMS = ("PPO", "RTO")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The embedded task, trained from nothing to RTO against PPO."""

    output_dir: str = "runs/demo"
    """Folder of the whole demo; run again, it goes on where it stopped."""
    seed: int = 0
    """Seed of the task, the data, the initial weights and the sampling."""
    difficulty: Literal["easy", "medium", "hard"] = "medium"
    """How sparse and how delayed the true token reward is."""

    # Data
    corpus_rows: int = 4000
    """Texts of the SFT corpus."""
    pairs: int = 1000
    """Preference pairs, sampled from the SFT model."""
    prompts: int = 2000
    """Prompts that RTO and PPO draw from."""
    eval_prompts: int = 512
    """Prompts that all models are judged on, in none of the training data by construction of their seed."""
    max_response_length: int = 48
    """Tokens sampled at most."""

    heads: int = 4
    """Attention heads of the models, 64 wide in all; vLLM on a CPU needs 2."""

    # Stages
    sft_lr: float = 2e-3
    """Peak learning rate of SFT."""
    rm_lr: float = 5e-4
    """Peak learning rate of the reward model."""
    rm_batch: int = 16
    """Pairs a reward-model step."""
    rm_epochs: float = 3.0
    """Passes of the reward model over its pairs."""
    dpo_lr: float = 5e-4
    """Peak learning rate of DPO."""
    stage_epochs: float = 2.0
    """Passes of SFT and DPO over their rows."""
    dpo_beta: float = 0.1
    """DPO's beta."""

    # RTO and PPO
    iterations: int = 40
    """Rollouts of each arm."""
    rollout_batch: int = 64
    """Responses a rollout."""
    train_batch: int = 16
    """Responses an update."""
    policy_lr: float = 5e-4
    """Peak learning rate of the policy, both arms."""
    critic_lr: float = 1e-3
    """Peak learning rate of the critic, both arms."""
    beta1: float = 0.1
    """RTO's scale of the token reward; PPO's is 0. With beta2 the paper's values for TL;DR."""
    dpo_clip: float = 0.1
    """Bound on the scaled token reward; 0 = off."""
    beta2: float = 0.05
    """Scale of the KL penalty, both arms."""

    def validate(self) -> None:
        """Raises ConfigError on sizes that are not positive; the stages check the rest."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("seed", "dpo_clip", "beta2") and isinstance(value, int | float) and not value > 0:
                raise ConfigError(f"{field.name}: must be positive, got {value}")


@dataclass(frozen=True)
class Judgement:
    """A model on the evaluation prompts."""

    true_reward: float
    """Mean sum of true token rewards of a response."""
    kl: float
    """Mean log(pi / pi_sft) of a response, nats."""
    win_rate: float
    """Share of prompts where it beats the SFT model's sample by the true reward; a tie counts a half."""
    length: float
    """Mean tokens of a response."""


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
        ("preference pairs from the SFT model's own samples", "pairs", lambda: _pairs(task, config, root)),
        ("reward model", "rm", lambda: train_rm(_rm(config, root))),
        ("DPO, the token reward's source", "dpo", lambda: train_dpo(dpo_config(config, root))),
    ), 1):  # fmt: skip
        _stage(console, root, number, title, name, make)


def _stage(console: Console, root: Path, number: int, title: str, name: str, make: Callable[[], object]) -> None:
    console.rule(f"[bold]{number}/6  {title}")
    if (root / name / "done").exists():
        console.print(f"{root / name} is there already")
        return
    make()
    distributed.barrier()
    if distributed.rank() == 0:
        (root / name / "done").touch()
    distributed.barrier()


class Truth:
    """Logs the true reward of each rollout beside what the models say of it."""

    def __init__(self, task: TinyTask) -> None:
        self.task = task

    def __call__(self, rollout: Rollout, texts: ResponseTexts) -> dict[str, float]:
        rewards = true_rewards(self.task, rollout)
        return {"true/reward": sum(rewards) / len(rewards)}


def true_rewards(task: TinyTask, rollout: Rollout) -> list[float]:
    """Sum of the true token rewards of each response."""
    pairs = zip(rollout.prompts(), rollout.responses(), strict=True)
    return [sum(task.token_rewards(p.tolist(), r.tolist())) for p, r in pairs]


def _common(config: DemoConfig, root: Path, name: str) -> dict[str, object]:
    return {
        "output_dir": str(root / name), "seed": config.seed, "dtype": "fp32", "gradient_checkpointing": False,
        "resume": "auto", "data_cache": False, "warmup_ratio": 0.03,
    }  # fmt: skip


def _sft(config: DemoConfig, root: Path) -> SFTConfig:
    return SFTConfig(
        model=str(root / "data" / "model"), data=str(root / "data" / "corpus.jsonl"), lr=config.sft_lr, batch=32,
        epochs=config.stage_epochs, max_length=128, log_every=25, **_common(config, root, "sft"),
    )  # fmt: skip


def _rm(config: DemoConfig, root: Path) -> RMConfig:
    return RMConfig(
        model=str(root / "sft" / "model"), data=str(root / "pairs" / "pairs.jsonl"), lr=config.rm_lr,
        batch=config.rm_batch, epochs=config.rm_epochs, max_length=128, eval_fraction=0.1, log_every=25,
        **_common(config, root, "rm"),
    )  # fmt: skip


def dpo_config(config: DemoConfig, root: Path) -> DPOConfig:
    """The settings of the token reward's source."""
    return DPOConfig(
        model=str(root / "sft" / "model"), data=str(root / "pairs" / "pairs.jsonl"), lr=config.dpo_lr, batch=32,
        epochs=config.stage_epochs, max_length=128, eval_fraction=0.1, log_every=25, beta=config.dpo_beta,
        **_common(config, root, "dpo"),
    )  # fmt: skip


def rl_config(config: DemoConfig, root: Path, arm: str) -> RTOConfig:
    """The settings of an arm; the two differ in beta1 (and the DPO model that beta1 = 0 never loads)."""
    token_reward = {"beta1": config.beta1, "dpo_model": str(root / "dpo" / "model")} if arm == "RTO" else {"beta1": 0.0}
    return RTOConfig(
        policy=str(root / "sft" / "model"), reward_model=(str(root / "rm" / "model"),),
        data=str(root / "data" / "prompts.jsonl"), iterations=config.iterations,
        rollout_batch=config.rollout_batch, train_batch=config.train_batch, max_prompt_length=32,
        max_response_length=config.max_response_length, policy_lr=config.policy_lr, critic_lr=config.critic_lr,
        dpo_clip=config.dpo_clip, beta2=config.beta2, save_every=max(1, config.iterations // 4), keep_last=1,
        log_every=5, rollout_engine="transformers",  # the faster one on models this small: bench/bench_rollout.py
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
        runfiles.write_atomic(path, json.dumps(mine, indent=2) + "\n")
    distributed.barrier()


def _first_data(task: TinyTask, config: DemoConfig, root: Path) -> None:
    if distributed.rank() == 0:
        task.save_model(root / "data" / "model", config.seed, config.heads)
        _write(root / "data" / "corpus.jsonl", task.texts(config.corpus_rows, seed=1))
        _write(root / "data" / "prompts.jsonl", task.prompts(config.prompts, seed=2))


def _pairs(task: TinyTask, config: DemoConfig, root: Path) -> None:
    """Two samples of the SFT model a prompt, preferred by Bradley-Terry on the true reward."""
    if distributed.rank() != 0:
        return
    prompts = [row["prompt"] for row in task.prompts(config.pairs, seed=3)]
    first, second = (sample(task, config, root / "sft" / "model", prompts, run_seed) for run_seed in (1, 2))
    texts = [
        task.tokenizer.batch_decode([r.tolist() for r in rollout.responses()], skip_special_tokens=True)
        for rollout in (first, second)
    ]
    rng = random.Random(f"pairs/{config.seed}")
    rows = [task.preference(p, a, b, rng) for p, a, b in zip(prompts, *texts, strict=True) if a and b and a != b]
    _write(root / "pairs" / "pairs.jsonl", rows)


def sample(task: TinyTask, config: DemoConfig, model: Path, prompts: Sequence[str], run_seed: int) -> Rollout:
    """One response to each prompt at temperature 1; the seeds depend on the demo's seed, `run_seed` and the place."""
    seeds = [sample_seed(config.seed, i, run_seed, 0) for i in range(len(prompts))]
    return draw(task.tokenizer, model, prompts, seeds, config.max_response_length)


def draw(
    tokenizer: PreTrainedTokenizerBase, model: Path, prompts: Sequence[str], seeds: Sequence[int], max_tokens: int
) -> Rollout:
    """One response of `model` to each prompt at temperature 1, each with its own seed."""
    engine = TransformersEngine(model, distributed.device(), torch.float32, tokenizer.pad_token_id or 0)
    template = load_template("auto", tokenizer)
    requests = [
        Request(tuple(template.encode_prompt(tokenizer, prompt)), i, i, 0, seed)
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    sampling = Sampling(max_tokens, 1.0, stop_token_ids(str(model), tokenizer, template))
    return engine.generate(requests, sampling, lambda tokens, sequences: None)


def judge(task: TinyTask, config: DemoConfig, root: Path) -> dict[str, Judgement]:
    """SFT, DPO and both arms on fresh prompts, by the truth. Rank 0 alone computes it; others get {}."""
    if distributed.rank() != 0:
        return {}
    judge_one = task_judge(task, config, root)
    folders = {"SFT": root / "sft" / "model", "DPO": root / "dpo" / "model"}
    folders |= {arm: root / arm.lower() / "policy" for arm in ARMS}
    return {name: judge_one(folder) for name, folder in folders.items()}


def task_judge(task: TinyTask, config: DemoConfig, root: Path) -> Judge:
    """By the true reward, on prompts that no stage has drawn."""
    prompts = [row["prompt"] for row in task.prompts(config.eval_prompts, seed=4)]
    return Judge(
        root / "sft" / "model",
        lambda folder: sample(task, config, folder, prompts, run_seed=3),
        lambda rollout: true_rewards(task, rollout),
    )


class Judge:
    """Compares models with the SFT model on the same prompts, by a reward that they were not trained on."""

    def __init__(
        self, sft: Path, respond: Callable[[Path], Rollout], reward: Callable[[Rollout], Sequence[float]]
    ) -> None:
        """sft: the SFT model's folder; respond: a model's answers to the prompts; reward: of each of them."""
        attention, kernel = resolve_attention("auto", distributed.device(), torch.float32)
        self.placement = Placement(distributed.device(), kernel, lockstep=False, micro_tokens=8192)
        self.loading = {"dtype": torch.float32, "attention": attention}
        self.sft = load_policy(str(sft), argument="sft", **self.loading).to(distributed.device()).eval()
        self.respond, self.reward = respond, reward
        self.base = respond(sft)
        self.base_rewards = reward(self.base)

    def __call__(self, folder: Path) -> Judgement:
        rollout = self.respond(folder)
        rewards = self.reward(rollout)
        log_ratio = float(rollout.sampler_logp.sum()) - float(torch.cat(self.logps(self.sft, rollout)).sum())
        wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(rewards, self.base_rewards, strict=True))
        return Judgement(
            true_reward=sum(rewards) / len(rewards),
            kl=log_ratio / len(rewards),
            win_rate=wins / len(rewards),
            length=float(rollout.response_lens.float().mean()),
        )

    @torch.no_grad()
    def logps(self, policy: PolicyModel, rollout: Rollout) -> list[torch.Tensor]:
        """B tensors of the response tokens' log-probs under `policy`, fp32, nats."""
        out: list[torch.Tensor] = [torch.empty(0)] * len(rollout)
        for index, batch in self.placement.micro(rollout.sequences(), rollout.prompt_lens.tolist()):
            for i, logp in zip(index, policy(batch).split(batch.cu_responses.diff().tolist()), strict=True):
                out[i] = logp
        return out


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
    runfiles.write_atomic(
        root / "results.json", json.dumps({n: dataclasses.asdict(j) for n, j in found.items()}, indent=2) + "\n"
    )
    curves = {arm: runfiles.read_metrics(root / arm.lower() / runfiles.METRICS) for arm in ARMS}
    levels = [Curve(name, (), (found[name].true_reward,)) for name in ("SFT", "DPO")]
    charts = [
        Chart("True reward against samples", [*levels, *(truth_curve(arm, r, "samples") for arm, r in curves.items())],
              "responses drawn", "true reward", "Mean of a rollout, averaged over five iterations."),
        Chart("True reward against KL", [truth_curve(arm, r, "kl/response") for arm, r in curves.items()],
              "KL to SFT, nats a response", "true reward", "The same points, placed by how far the policy has moved."),
    ]  # fmt: skip
    shown = []
    for arm in reversed(ARMS):
        kept = runfiles.read_samples(root / arm.lower() / runfiles.SAMPLES)
        shown += [dataclasses.replace(s, label=arm) for s in kept[:2] + kept[-6:]]
    path = write_report(
        root / "report.html", title="RTO against PPO on the embedded task",
        subtitle=f"Seed {config.seed}, {config.difficulty}, {samples:,} samples each; the same reward model, "
        "learning rates and prompts.",
        summary={f"{n}: true reward": f"{j.true_reward:.2f}" for n, j in found.items()},
        tables=[Table("Judged by the true reward on fresh prompts", columns, rows,
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
    runfiles.write_atomic(path, "".join(map(runfiles.json_line, rows)))
