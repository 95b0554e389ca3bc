"""Worlds on a real pretrained model: stories by a 260K-parameter Llama, where a checkout has `../shared` beside it.

stories-rule    preferences are Bradley-Terry on `story_reward`, which also judges
stories-taste   preferences come from a file whose rule is unknown; a reward model trained on half of it judges the
                models, whose own reward model, DPO and prompts come from the other half

Both start from the pretrained model fine-tuned on the first sentences of one half's stories, so that stories end.
Models are judged on openings that neither half has.
"""

from __future__ import annotations

import functools
import math
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer

from bench.claim.cells import NO_TEXTS, learnt_rewards, opinions, reward_model, second_rm
from rto_fast.config import DPOConfig, RMConfig, RTOConfig, SFTConfig
from rto_fast.contract import ResponseTexts, Rollout
from rto_fast.demo.judge import Judge, Judgement, draw
from rto_fast.demo.tiny_task import held_out
from rto_fast.logs.files import METRICS, json_line, read_metrics, read_rows, write_atomic
from rto_fast.rollout.engine import sample_seed
from rto_fast.scoring.reward_model import ModelReward
from rto_fast.supervised.dpo import train_dpo
from rto_fast.supervised.reward_model import train_rm
from rto_fast.supervised.sft import train_sft

TASKS = ("stories-rule", "stories-taste")
SHARED = Path(__file__).parents[3] / "shared"
MODEL, PAIRS = SHARED / "models" / "stories260k", SHARED / "data" / "story_preferences.jsonl"
CHARACTERS = 160
"""Of a story; its sentences behind them are left out, so that a run takes half a minute."""
MAX_PROMPT, MAX_RESPONSE = 48, 72
"""Tokens."""
ROWS = 700
"""Pairs of each half."""

NATURE = "tree trees bird birds dog cat sun sky flower flowers forest river water rain grass fish bear bunny frog bug"
PEOPLE = "mom mommy dad daddy girl boy man woman lady friend friends"
"""Words that the rule counts, each once a story."""


def story_reward(text: str) -> float:
    """The rule, stories of nature rather than of people: +1 for each word of NATURE that the text uses, -1 for each of
    PEOPLE. Neither repetition nor length counts."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return float(len(words & set(NATURE.split())) - len(words & set(PEOPLE.split())))


def whole_sentences(text: str) -> str:
    """The sentences that end within the first CHARACTERS; empty where none does."""
    found = re.match(r'.*[.!?]"?', text[:CHARACTERS], re.DOTALL)
    return found[0].strip() if found else ""


def available() -> bool:
    return MODEL.is_dir() and PAIRS.is_file()


def parts(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]], list[str]]:
    """The file's pairs, shuffled, stories cut to whole sentences: (for the models, for the judge), and openings of
    neither, which models are judged on."""
    rows = [
        {"prompt": r["prompt"]} | {k: whole_sentences(r[k]) for k in ("chosen", "rejected")} for r in read_rows(PAIRS)
    ]
    rows = [r for r in rows if r["chosen"] and r["rejected"] and r["chosen"] != r["rejected"]]
    random.Random(f"halves/{seed}").shuffle(rows)
    training = [r for r in rows if not held_out(r["prompt"])]
    return training[:ROWS], training[ROWS : 2 * ROWS], [r["prompt"] for r in rows if held_out(r["prompt"])]


class StoryWorld:
    """One of TASKS."""

    def __init__(self, root: Path, task: str, seed: int, iterations: int, eval_prompts: int) -> None:
        self.root, self.task, self.seed, self.iterations = root, task, seed, iterations
        self.ours, self.theirs, openings = parts(seed)
        self.eval_prompts = openings[:eval_prompts]
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.sft = root / "sft" / "model"

    def draw(self, model: Path, prompts: Sequence[str], run_seed: int) -> Rollout:
        seeds = [sample_seed(self.seed, i, run_seed, 0) for i in range(len(prompts))]
        return draw(self.tokenizer, model, prompts, seeds, MAX_RESPONSE)

    def texts(self, rollout: Rollout) -> list[str]:
        return self.tokenizer.batch_decode([r.tolist() for r in rollout.responses()], skip_special_tokens=True)

    def rewards(self, rollout: Rollout) -> list[float]:
        """The truth of each response: the rule's, or the held-out reward model's score."""
        if self.task == "stories-rule":
            return [story_reward(text) for text in self.texts(rollout)]
        return self.held_out.score(rollout, NO_TEXTS).tolist()

    @functools.cached_property
    def held_out(self) -> ModelReward:
        return reward_model(self.root / "judge" / "model")

    @functools.cached_property
    def judge_one(self) -> Judge:
        return Judge(self.sft, lambda folder: self.draw(folder, self.eval_prompts, 3), self.rewards)

    def prepare(self) -> dict[str, float]:
        shutil.rmtree(self.root, ignore_errors=True)
        self._write(
            "corpus", [{"prompt": r["prompt"], "response": r[k]} for r in self.ours for k in ("chosen", "rejected")]
        )
        self._write("prompts", [{"prompt": r["prompt"]} for r in self.ours])
        length = {"max_length": MAX_PROMPT + MAX_RESPONSE}
        train_sft(SFTConfig(model=str(MODEL), lr=5e-4, batch=32, **length, **self._files("sft", "corpus")))
        self._write("pairs", self._sampled_pairs() if self.task == "stories-rule" else self.ours)
        first = RMConfig(lr=5e-4, batch=16, epochs=3.0, **self._learns("rm", "pairs"))
        train_rm(first)
        train_rm(second_rm(first))
        train_dpo(self.preference())
        quality = {}
        if self.task == "stories-taste":
            self._write("held_out", self.theirs)
            train_rm(RMConfig(lr=5e-4, batch=16, epochs=3.0, **self._learns("judge", "held_out")))
            quality["judge_accuracy"] = read_metrics(self.root / "judge" / METRICS)[-1]["eval/accuracy"]
        return quality | learnt_rewards(self.judge_one, self.root, self.rl(True))[0]

    def respond(self, model: str, prompts: int, each: int, run_seed: int) -> Rollout:
        repeated = [p for p in self.eval_prompts[:prompts] for _ in range(each)]
        return self.draw(self.root / model / "model", repeated, run_seed)

    def opinions(self, rollout: Rollout) -> dict[str, Tensor]:
        return opinions(self.judge_one, self.root, self.rl(True), rollout)

    def preference(self) -> DPOConfig:
        return DPOConfig(lr=3e-4, batch=32, epochs=2.0, beta=0.1, **self._learns("dpo", "pairs"))

    def rl(self, pays_tokens: bool) -> RTOConfig:
        token_reward = {"beta1": 0.1, "dpo_model": str(self.root / "dpo" / "model")} if pays_tokens else {"beta1": 0.0}
        return RTOConfig(
            policy=str(self.sft), reward_model=(str(self.root / "rm" / "model"),), iterations=self.iterations,
            rollout_batch=64, train_batch=16, max_prompt_length=MAX_PROMPT, max_response_length=MAX_RESPONSE,
            critic_lr=1e-3, dpo_clip=0.1, beta2=0.05, **token_reward, **self._files("rl", "prompts"),
        )  # fmt: skip

    def judge(self, folder: Path | None) -> Judgement:
        return self.judge_one(folder or self.sft)

    def truth(self) -> Callable[[Rollout, ResponseTexts], dict[str, float]]:
        def observe(rollout: Rollout, texts: ResponseTexts) -> dict[str, float]:
            rewards = self.rewards(rollout)
            return {"true/reward": sum(rewards) / len(rewards)}

        return observe

    def _sampled_pairs(self) -> list[dict[str, str]]:
        """Two stories of the SFT model an opening, preferred by Bradley-Terry on the rule."""
        prompts, rng = [r["prompt"] for r in self.ours], random.Random(f"pairs/{self.seed}")
        first, second = (self.texts(self.draw(self.sft, prompts, run_seed)) for run_seed in (1, 2))
        rows = []
        for prompt, a, b in zip(prompts, first, second, strict=True):
            if a.strip() and b.strip() and a != b:
                chosen, rejected = prefer(a.strip(), b.strip(), rng)
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        return rows

    def _files(self, name: str, data: str) -> dict[str, object]:
        return {
            "output_dir": str(self.root / name), "data": str(self.root / f"{data}.jsonl"), "seed": self.seed,
            "dtype": "fp32", "gradient_checkpointing": False, "data_cache": False,
        }  # fmt: skip

    def _learns(self, name: str, data: str) -> dict[str, object]:
        """What the stages that learn from pairs share."""
        return {"model": str(self.sft), "max_length": MAX_PROMPT + MAX_RESPONSE, "eval_fraction": 0.1} | self._files(
            name, data
        )

    def _write(self, name: str, rows: Sequence[dict[str, str]]) -> None:
        write_atomic(self.root / f"{name}.jsonl", "".join(map(json_line, rows)))


def prefer(a: str, b: str, rng: random.Random) -> tuple[str, str]:
    """(chosen, rejected) by Bradley-Terry on the rule."""
    margin = story_reward(a) - story_reward(b)
    return (a, b) if rng.random() < 1 / (1 + math.exp(-margin)) else (b, a)
