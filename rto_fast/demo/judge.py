"""Judge models by the task's true token reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rto_fast import distributed
from rto_fast.contract import Request, ResponseTexts, Rollout
from rto_fast.data.chat_template import load_template
from rto_fast.data.tokenizer import stop_token_ids
from rto_fast.demo.config import ARMS, DemoConfig
from rto_fast.demo.tiny_task import TinyTask
from rto_fast.models.attention import resolve_attention
from rto_fast.models.heads import PolicyModel
from rto_fast.models.load import load_policy
from rto_fast.models.packing import Placement
from rto_fast.rollout.engine import Sampling, sample_seed
from rto_fast.rollout.transformers_engine import TransformersEngine


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
    """SFT, DPO and both arms on newly drawn prompts, by the truth. Rank 0 alone computes it; others get {}."""
    if distributed.rank() != 0:
        return {}
    judge_one = task_judge(task, config, root)
    folders = {"SFT": root / "sft" / "model", "DPO": root / "dpo" / "model"}
    folders |= {arm: root / arm.lower() / "policy" for arm in ARMS}
    return {name: judge_one(folder) for name, folder in folders.items()}


def task_judge(task: TinyTask, config: DemoConfig, root: Path) -> Judge:
    """By the true reward, on prompts with a seed of their own; no stage saw them where `task` has held-out openings."""
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
        self.loading: dict[str, Any] = {"dtype": torch.float32, "attention": attention}
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
