"""One cell of the claim's experiment: a model trained by one method, with one seed, and judged by the truth.

A world is what the methods of one task and seed share: the SFT model, the preference pairs, the reward model, the
DPO model that gives token rewards, the prompts and the judge.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from rich.console import Console
from torch import Tensor

from bench.claim import monte_carlo, tilting
from bench.claim.tilting import Source
from rto_fast import distributed, trainer
from rto_fast.config import DPOConfig, RMConfig, RTOConfig
from rto_fast.contract import ResponseTexts, Rollout
from rto_fast.demo.config import DemoConfig
from rto_fast.demo.judge import Judge, Judgement, Truth, sample, task_judge
from rto_fast.demo.pipeline import dpo_config, prepare, rl_config, rm_config, sampled_pairs
from rto_fast.demo.tiny_task import TinyTask, make_task
from rto_fast.errors import Diverged
from rto_fast.logs.files import METRICS, finite_or_none, json_line, read_metrics, write_atomic
from rto_fast.models.attention import resolve_attention
from rto_fast.models.load import load_policy, load_scalar
from rto_fast.models.packing import Placement
from rto_fast.scoring.reward_model import ModelReward
from rto_fast.supervised.dpo import train_dpo
from rto_fast.supervised.reward_model import train_rm

PREFERENCE = {
    "DPO": "dpo", "R-DPO": "r_dpo", "SimPO": "simpo", "TDPO1": "tdpo1", "TDPO2": "tdpo2", "KTO": "kto", "IPO": "ipo",
    "MPPO": "mppo", "MPO": "mpo",
}  # fmt: skip
"""Method -> `objective`."""

SECOND, SECOND_SEED = "rm2", 10_000
"""The second reward model's folder, and what its seed is away from the first one's."""

TWO_RMS = "PPO on two RMs"
"""PPO on the sum of two reward models that differ in their seed alone: a second opinion without any token reward."""

RL: dict[str, dict[str, Any]] = {
    "PPO": {},
    "RTO": {},
    "Semi-RTO": {"credit": "sentence"},
    "DDPO": {"credit": "response"},
    "RS-PPO": {"credit": "shaped"},
    TWO_RMS: {},
    "REINFORCE++": {"advantage": "reinforce_pp"},
    "RTO with REINFORCE++": {"advantage": "reinforce_pp"},
    "GRPO": {"advantage": "grpo", "responses_per_prompt": 4},
    "RLOO": {"advantage": "rloo", "responses_per_prompt": 4},
    "P3O": {"policy_update": "p3o", "responses_per_prompt": 2},
    "REBEL": {"policy_update": "rebel", "responses_per_prompt": 2},
}
"""Method -> what it changes in PPO's settings (RTO's where it pays token rewards); TWO_RMS has a second model."""

PRIME = "PRIME"
ONLINE: dict[str, dict[str, Any]] = {
    "online RTO": {"online": "dpo", "responses_per_prompt": 2},
    PRIME: {"online": "prime"},
}
"""RTO whose DPO model learns from the rollouts; PRIME's starts as the SFT model, without a preference pair."""

PAYS_TOKENS = ("RTO", "Semi-RTO", "DDPO", "RS-PPO", "RTO with REINFORCE++", *ONLINE)
METHODS = ("SFT", *PREFERENCE, *RL)
ORACLE = "oracle"
"""The method of a cell that trains nothing: the lines of bench/claim/tilting.py."""
MORE = "more DPO models"
"""The method of a cell that trains what the changes "round" and "dpo_models" take."""
NO_TEXTS = ResponseTexts([], [], [])
"""Reward models that read tokens need no text."""


@dataclass(frozen=True)
class Cell:
    """What is trained. SFT is the world itself: its cell trains what all methods share."""

    task: str
    seed: int
    method: str = "SFT"
    lr: float = 0.0
    """Peak learning rate of the policy."""
    part: int = 1
    """The run draws 1 / part of the samples, with a schedule of its own."""
    change: tuple[tuple[str, Any], ...] = ()
    """Settings that differ from the method's own."""

    @property
    def name(self) -> str:
        """Path of the cell's result below the folder of runs, without suffix."""
        words = [self.method.replace(" ", "-")]
        words += [f"lr{self.lr:g}"] if self.lr else []
        words += [f"part{self.part}"] if self.part > 1 else []
        words += [f"{k}{v}" for k, v in self.change]
        return f"{self.task}/seed{self.seed}/" + "_".join(words)


def oracle_cell(task: str, seed: int, prompts: int, each: int) -> Cell:
    """The tilting oracle's lines, from 2 * each responses to each of `prompts` evaluation prompts."""
    return Cell(task, seed, ORACLE, change=(("prompts", prompts), ("each", each)))


class World(Source, Protocol):
    """What the methods of one task and seed share."""

    root: Path
    """Folder of its models: sft, rm, rm2 (the second reward model), dpo."""

    def prepare(self) -> dict[str, float]:
        """Trains what they share, or finds it there; returns the quality of the learnt rewards."""

    def preference(self) -> DPOConfig:
        """Settings of the preference methods."""

    def rl(self, pays_tokens: bool) -> RTOConfig:
        """RTO's settings, or PPO's."""

    def judge(self, folder: Path | None) -> Judgement:
        """A model, or where None the SFT model."""

    def truth(self) -> Callable[[Rollout, ResponseTexts], dict[str, float]]:
        """What logs the true reward of each rollout."""


class TinyWorld:
    """The embedded task; models are judged on openings that no stage has seen."""

    def __init__(self, root: Path, config: DemoConfig, task: TinyTask | None = None) -> None:
        """task: another one than the seed's at the config's difficulty."""
        self.root, self.config = root, config
        self.task = dataclasses.replace(task or make_task(config.seed, config.difficulty), openings="training")

    @functools.cached_property
    def judge_one(self) -> Judge:
        return task_judge(dataclasses.replace(self.task, openings="held_out"), self.config, self.root)

    def prepare(self) -> dict[str, float]:
        prepare(self.task, self.config, self.root, Console())
        train_rm(second_rm(rm_config(self.config, self.root)))
        base = self.judge_one.base
        pairs = zip(base.prompts(), base.responses(), strict=True)
        token_truth = [r for p, a in pairs for r in self.task.token_rewards(p.tolist(), a.tolist())]
        learnt, ratios = learnt_rewards(self.judge_one, self.root, self.rl(True))
        return learnt | {"dpo_token": correlation(ratios, torch.tensor(token_truth))}

    def prepare_more(self) -> None:
        """dpo_b, a second DPO model that differs in its seed; dpo2, a second round of DPO on samples of the first."""
        first = dpo_config(self.config, self.root)
        train_dpo(dataclasses.replace(first, output_dir=str(self.root / "dpo_b"), seed=first.seed + SECOND_SEED))
        model, rows = self.root / "dpo" / "model", self.root / "pairs" / "pairs2.jsonl"
        write_atomic(rows, "".join(map(json_line, sampled_pairs(self.task, self.config, model, seed=5))))
        train_dpo(dataclasses.replace(first, output_dir=str(self.root / "dpo2"), model=str(model), data=str(rows)))

    def preference(self) -> DPOConfig:
        return dpo_config(self.config, self.root)

    def rl(self, pays_tokens: bool) -> RTOConfig:
        return rl_config(self.config, self.root, "RTO" if pays_tokens else "PPO")

    def judge(self, folder: Path | None) -> Judgement:
        return self.judge_one(folder or self.root / "sft" / "model")

    def truth(self) -> Truth:
        return Truth(self.task)

    def respond(self, model: str, prompts: int, each: int, run_seed: int) -> Rollout:
        asked = dataclasses.replace(self.task, openings="held_out").prompts(prompts, seed=4)
        repeated = [row["prompt"] for row in asked for _ in range(each)]
        return sample(self.task, self.config, self.root / model / "model", repeated, run_seed)

    def opinions(self, rollout: Rollout) -> dict[str, Tensor]:
        return opinions(self.judge_one, self.root, self.rl(True), rollout)


class DemoWorld(TinyWorld):
    """The embedded task as `make demo` has it: one reward model, and the demo's own prompts everywhere."""

    def __init__(self, root: Path, config: DemoConfig) -> None:
        super().__init__(root, config)
        self.task = make_task(config.seed, config.difficulty)

    @functools.cached_property
    def judge_one(self) -> Judge:
        return task_judge(self.task, self.config, self.root)

    def prepare(self) -> dict[str, float]:
        prepare(self.task, self.config, self.root, Console())
        return {}


def second_rm(config: RMConfig) -> RMConfig:
    """A reward model like the first on the same pairs: another seed draws head, order and held-out rows."""
    return dataclasses.replace(
        config, output_dir=str(Path(config.output_dir).parent / SECOND), seed=config.seed + SECOND_SEED
    )


def token_logps(judge: Judge, root: Path, rollout: Rollout) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs of each response's tokens, fp32: (the SFT model's, the DPO model's)."""
    dpo = load_policy(str(root / "dpo" / "model"), argument="dpo", **judge.loading).eval()
    return judge.logps(judge.sft, rollout), judge.logps(dpo, rollout)


def paid(ratios: Sequence[Tensor], settings: RTOConfig) -> Tensor:
    """[B] what RTO pays a response for its tokens' log-ratios in all, each scaled and clipped."""
    return torch.stack([bounded(settings.beta1 * r, settings.dpo_clip).sum() for r in ratios])


def bounded(value: Tensor, bound: float) -> Tensor:
    """Clipped to +-bound; 0 = not at all."""
    return value.clamp(-bound, bound) if bound else value


def opinions(judge: Judge, root: Path, settings: RTOConfig, rollout: Rollout) -> dict[str, Tensor]:
    """As `Source.opinions`."""
    sft, dpo = token_logps(judge, root, rollout)
    score = reward_model(root / "rm" / "model").score(rollout, NO_TEXTS)
    return {
        "sft_logp": torch.stack([a.double().sum() for a in sft]),
        "dpo_logp": torch.stack([a.double().sum() for a in dpo]),
        "rm": settings.beta3 * bounded(score, settings.score_clip),
        "dpo": paid([d - s for d, s in zip(dpo, sft, strict=True)], settings),
        "truth": torch.tensor(judge.reward(rollout)),
    }


def learnt_rewards(judge: Judge, root: Path, settings: RTOConfig) -> tuple[dict[str, float], Tensor]:
    """How the learnt rewards correlate with the truth over the SFT model's samples: the reward model's score, the DPO
    model's summed log-ratio as it is and as RTO pays it, each token clipped; and the log-ratio of each token, [R]
    fp32."""
    truth = torch.tensor(judge.base_rewards)
    sft, dpo = token_logps(judge, root, judge.base)
    ratios = [a - b for a, b in zip(dpo, sft, strict=True)]
    first, second = (reward_model(root / name / "model").score(judge.base, NO_TEXTS) for name in ("rm", SECOND))
    quality = {
        "rm": correlation(first, truth),
        "rm2": correlation(second, truth),
        "rm_rm2": correlation(first, second),
        "dpo": correlation(torch.stack([r.sum() for r in ratios]), truth),
        "dpo_paid": correlation(paid(ratios, settings), truth),
    }
    return quality, torch.cat(ratios)


def reward_model(folder: Path) -> ModelReward:
    """A reward model's scores of the policies' own tokens."""
    attention, kernel = resolve_attention("auto", distributed.device(), torch.float32)
    model = load_scalar(str(folder), argument="reward_model", dtype=torch.float32, attention=attention).eval()
    return ModelReward("rm", model, Placement(distributed.device(), kernel, lockstep=False, micro_tokens=8192))


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; NaN where one of them is constant."""
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def preference_settings(world: World, cell: Cell, folder: Path) -> DPOConfig:
    return dataclasses.replace(
        world.preference(), objective=PREFERENCE[cell.method], lr=cell.lr, output_dir=str(folder), **dict(cell.change)
    )


OTHER_PAIRS = {"rm_pairs": ("reward_model", "rm"), "dpo_pairs": ("dpo_model", "dpo")}
"""Changes that take one model of the same task and seed with another number of pairs, whose `other_world` comes first;
name -> (setting, the model's folder)."""
MODEL_CHANGES = (*OTHER_PAIRS, "dpo_models", "round", "extrapolate")
"""The changes of which models are loaded: those, the mean of two DPO models, the one of the second round, and its
log-ratio extrapolated away from the first round's by a factor; all but OTHER_PAIRS need the cell of MORE."""
VALUE_SAMPLES = "value_samples"
"""The change that takes so many continuations of each token for its value (monte_carlo.py) in place of the critic."""


def other_world(cell: Cell, pairs: int) -> Cell:
    """What the methods share on a cell's task and seed, learnt from another number of pairs."""
    return Cell(f"{cell.task}-{pairs}", cell.seed)


def other_models(world: World, cell: Cell) -> dict[str, tuple[Any, ...]]:
    """The settings that MODEL_CHANGES stand for."""
    change = dict(cell.change)
    found, runs = {}, world.root.parents[2]
    for name in OTHER_PAIRS.keys() & change.keys():
        setting, folder = OTHER_PAIRS[name]
        other = runs / other_world(cell, change[name]).task / world.root.parent.name / world.root.name
        found[setting] = (str(other / folder / "model"),)
    first, second, again = (str(world.root / name / "model") for name in ("dpo", "dpo_b", "dpo2"))
    if change.get("dpo_models") == 2:
        found["dpo_model"] = (first, second)
    if change.get("round") == 2:
        found["dpo_model"] = (again,)
    if alpha := change.get("extrapolate"):
        found |= {"dpo_model": (again, first), "dpo_weight": (1 + alpha, -alpha)}
    return found


def rl_settings(world: World, cell: Cell, folder: Path) -> RTOConfig:
    """The method's settings; whatever it compares, each rollout has as many responses."""
    base = dataclasses.replace(world.rl(cell.method in PAYS_TOKENS), **other_models(world, cell))
    own = (RL | ONLINE)[cell.method] | {k: v for k, v in cell.change if k not in (*MODEL_CHANGES, VALUE_SAMPLES)}
    if cell.method == TWO_RMS:
        base = dataclasses.replace(base, reward_model=(*base.reward_model, str(world.root / SECOND / "model")))
    if cell.method in ONLINE:
        start = {"dpo_model": (str(world.root / "sft" / "model"),)} if cell.method == PRIME else {}
        base = dataclasses.replace(base, online_beta=world.preference().beta, **start)
    ours = {
        "policy_lr": cell.lr, "iterations": base.iterations // cell.part, "output_dir": str(folder),
        "rollout_batch": base.rollout_batch // own.get("responses_per_prompt", 1), "save_every": 0, "report": False,
        "report_samples": 0,
    }  # fmt: skip
    return dataclasses.replace(base, **ours | own)


def train(world: World, cell: Cell, folder: Path) -> tuple[Path, dict[str, list[float | None]]]:
    """The trained model's folder, and the figures of each rollout."""
    if cell.method in PREFERENCE:
        return train_dpo(preference_settings(world, cell, folder)), {}
    samples = dict(cell.change).get(VALUE_SAMPLES)
    value = functools.partial(monte_carlo.values, samples=samples) if samples else None
    trainer.train(rl_settings(world, cell, folder), world.truth(), value)
    rows = read_metrics(folder / METRICS)
    names = {"samples": "samples", "kl": "kl/response", "reward": "true/reward", "score": "reward/score"}
    curve = {short: [rounded(r[name]) for r in rows] for short, name in names.items()}
    if cell.method in ONLINE:
        curve["accuracy"] = [rounded(r.get("online/accuracy")) for r in rows]  # a rollout without a pair has none
    return folder / "policy", curve


def run_cell(cell: Cell, make_world: Callable[[str, int], World], runs: Path, commit: str) -> dict[str, Any]:
    """Trains and judges a cell; its result is written at the end, so that a killed cell starts anew.

    A run that diverges is a result too: {"failed": why}.
    """
    world, folder, begin = make_world(cell.task, cell.seed), runs / cell.name, time.process_time()
    found: dict[str, Any] = dataclasses.asdict(cell) | {"commit": commit}
    if cell.method == "SFT":
        found["quality"] = world.prepare()
        found["judgement"] = dataclasses.asdict(world.judge(None))
    elif cell.method == MORE:
        world.prepare_more()
    elif cell.method == ORACLE:
        found["oracle"] = tilting.lines(world, **dict(cell.change))
    else:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            model, found["curve"] = train(world, cell, folder)
            found["judgement"] = dataclasses.asdict(world.judge(model))
        except Diverged as error:
            found["failed"] = str(error)
        shutil.rmtree(folder, ignore_errors=True)
    found["cpu_s"] = round(time.process_time() - begin, 1)
    found = finite_or_none(found)
    write_atomic(runs / f"{cell.name}.json", json.dumps(found) + "\n")
    return found


def rounded(value: float | None) -> float | None:
    """To five significant digits."""
    return None if value is None else float(f"{value:.5g}")


def start_worker(log: Path) -> None:
    """A fresh process with one thread; what the library prints goes to a log."""
    handle = os.open(log / f"worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    distributed.init()
