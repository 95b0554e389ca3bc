"""Verifiable rewards on an embedded task: sums, in minutes on one core.

A problem is {"question": "What is 34 + 8?", "answer": "34 + 8 = 42\\n#### 42"}, as in GSM8K. The SFT model learns from
answers of which a share is off by ten, so that it is right as often as they are at best. The reward is whether the last
number is the right one; the policy is trained on some problems and judged on others.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rto_fast import distributed, trainer
from rto_fast.config import RLVRConfig, SFTConfig
from rto_fast.demo.config import ArithmeticConfig
from rto_fast.demo.judge import draw
from rto_fast.demo.tiny_task import BOS, EOS, PAD, SPECIALS, UNK, save_llama
from rto_fast.logs.files import json_line, write_atomic
from rto_fast.rollout.engine import sample_seed
from rto_fast.scoring.math_answers import MARK, last_number, wanted_answer
from rto_fast.supervised.sft import train_sft

CHARACTERS = "0123456789+=?# \nWhatis"
FIRST, SECOND = range(20, 80), range(1, 4)
"""The numbers of a sum; every answer has two digits, a wrong one too."""
WRONG_BY = (-10, 10)
RESPONSE_TOKENS = 16
"""An answer has 9 with its end of turn: a space, the mark, a space and the number."""
TRIES = 4
"""Responses to each problem that a model is judged by."""
Problem = dict[str, str]


def run(config: ArithmeticConfig) -> dict[str, float]:
    """Trains both stages, prints the share of held-out problems that each solves and writes it to `results.json`."""
    config.validate()
    if distributed.init().type == "cpu":
        torch.set_num_threads(1)  # models this small lose more to a second thread's start than they gain
    root = Path(config.output_dir)
    train, held_out = problems(config)
    if distributed.rank() == 0:
        _write_data(config, root, train, held_out)
    distributed.barrier()
    train_sft(_sft(config, root))
    trainer.train(_rlvr(config, root))
    found: dict[str, float] = {}
    if distributed.rank() == 0:
        found = {
            name: accuracy(config, root / path, held_out)
            for name, path in (("SFT", "sft/model"), ("RLVR", "rlvr/policy"))
        }
        write_atomic(root / "results.json", json.dumps(found, indent=2) + "\n")
        for name, share in found.items():
            print(f"{name}: {100 * share:.1f} % of {len(held_out)} held-out problems solved", flush=True)
    distributed.barrier()
    return found


def problems(config: ArithmeticConfig) -> tuple[list[Problem], list[Problem]]:
    """(for training, held out): every sum of two such numbers, in one of the two."""
    pairs = [(a, b) for a in FIRST for b in SECOND]
    random.Random(f"problems/{config.seed}").shuffle(pairs)
    rows = [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n{MARK} {a + b}"} for a, b in pairs]
    return rows[config.held_out :], rows[: config.held_out]


def accuracy(config: ArithmeticConfig, model: Path, rows: Sequence[Problem]) -> float:
    """Share of right responses of the model, several to each problem at temperature 1."""
    tokenizer, rows = character_tokenizer(), [row for row in rows for _ in range(TRIES)]
    seeds = [sample_seed(config.seed, i, 1, 0) for i in range(len(rows))]
    rollout = draw(tokenizer, model, [r["question"] for r in rows], seeds, RESPONSE_TOKENS)
    texts = tokenizer.batch_decode([r.tolist() for r in rollout.responses()], skip_special_tokens=True)
    return sum(score for score, _ in last_number(texts, [r["answer"] for r in rows])) / len(rows)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A character is a token; any sequence of them survives ids -> text -> ids."""
    vocabulary = dict.fromkeys((*SPECIALS, *CHARACTERS))
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK,
        clean_up_tokenization_spaces=False, model_max_length=128,
    )  # fmt: skip


def _corpus(config: ArithmeticConfig, train: Sequence[Problem]) -> list[dict[str, str]]:
    """Rows {prompt, response} of the training problems, a share of them with a wrong answer."""
    rng, rows = random.Random(f"corpus/{config.seed}"), []
    for _ in range(config.corpus_rows):
        problem = rng.choice(train)
        wrong = rng.choice(WRONG_BY) if rng.random() < config.wrong_share else 0
        answer = int(wanted_answer(problem["answer"])) + wrong
        rows.append({"prompt": problem["question"], "response": f"{MARK} {answer}"})
    return rows


def _write_data(config: ArithmeticConfig, root: Path, train: Sequence[Problem], held_out: Sequence[Problem]) -> None:
    for name, rows in (("train", train), ("held_out", held_out), ("corpus", _corpus(config, train))):
        write_atomic(root / f"{name}.jsonl", "".join(map(json_line, rows)))
    if not (root / "model").exists():
        save_llama(character_tokenizer(), root / "model", config.seed)


def _common(config: ArithmeticConfig, root: Path, name: str) -> dict[str, Any]:
    return {
        "output_dir": str(root / name), "seed": config.seed, "dtype": "fp32", "gradient_checkpointing": False,
        "resume": "auto", "data_cache": False,
    }  # fmt: skip


def _sft(config: ArithmeticConfig, root: Path) -> SFTConfig:
    return SFTConfig(
        model=str(root / "model"), data=str(root / "corpus.jsonl"), lr=config.sft_lr, batch=32,
        epochs=config.sft_epochs, max_length=64, log_every=25, **_common(config, root, "sft"),
    )  # fmt: skip


def _rlvr(config: ArithmeticConfig, root: Path) -> RLVRConfig:
    return RLVRConfig(
        policy=str(root / "sft" / "model"), data=str(root / "train.jsonl"), advantage=config.advantage,
        reward_fn=("rto_fast.scoring.math_answers:last_number",), iterations=config.iterations,
        rollout_batch=config.rollout_batch, responses_per_prompt=config.responses_per_prompt,
        train_batch=config.train_batch, max_prompt_length=24, max_response_length=RESPONSE_TOKENS,
        policy_lr=config.policy_lr, log_every=5, rollout_engine="transformers",  # faster for tiny models
        **_common(config, root, "rlvr"),
    )  # fmt: skip
