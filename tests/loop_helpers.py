"""Tiny models and data, and launches on several ranks, for the tests of the training loop.

Everything is made on the spot from random weights, so that nothing has to be downloaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which a process finds its ranks."""


# Models and data


@dataclass(frozen=True)
class TinyModels:
    """Folders of random Llamas with the embedded task's tokenizer (87 words), and JSONL files of its texts."""

    policy: str
    dpo: str
    """The policy with its weights moved: token log-ratios of a nat or so, some clipped and some not."""
    dpo_ref: str
    """Another move of the policy's weights."""
    reward: str
    """Reward model (`score` head) with a stored mean and std."""
    prompts: str
    """Rows {prompt}."""
    pairs: str
    """Rows {prompt, chosen, rejected}."""
    texts: str
    """Rows {prompt, response}."""


def save_llama(folder: Path, *, seed: int, vocab: int, ids: dict[str, int], tied: bool = False, **settings) -> None:
    """A random Llama with grouped queries whose next-token distribution is far from uniform."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    base = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    config = LlamaConfig(vocab_size=vocab, tie_word_embeddings=tied, **(base | settings), **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() == 2:
                    p.normal_(0, 0.3 if "embed" in name or "head" in name else 0.2)
    model.generation_config = GenerationConfig(do_sample=True, **ids)
    model.save_pretrained(folder)


def save_moved(source: Path, folder: Path, *, seed: int, by: float) -> None:
    """The model at `source` with normal noise of deviation `by` on every matrix."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p += by * torch.randn(p.shape, generator=generator)
    model.save_pretrained(folder)


def save_reward_model(folder: Path, source: Path, *, seed: int, mean: float, std: float) -> None:
    """A classifier on the backbone of `source`, with a random head and statistics to normalise by."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(seed)))
    model.config.mean, model.config.std = mean, std
    model.save_pretrained(folder)


def write_rows(path: Path, rows: Sequence[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def make_tiny_models(folder: Path, rows: int = 64, **settings) -> TinyModels:
    """Writes the models and data of `TinyModels` under `folder`; settings: of `save_llama`."""
    import random

    from rto_fast.tiny_task import make_task

    task = make_task(100, "easy")
    tokenizer = task.tokenizer
    ids = {n: getattr(tokenizer, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    policy, dpo, dpo_ref, reward = (folder / n for n in ("policy", "dpo", "dpo_ref", "reward"))
    save_llama(policy, seed=1, vocab=len(tokenizer), ids=ids, **settings)
    save_moved(policy, dpo, seed=2, by=0.03)
    save_moved(policy, dpo_ref, seed=3, by=0.02)
    save_reward_model(reward, policy, seed=4, mean=0.3, std=1.7)
    for path in (policy, dpo, dpo_ref, reward):
        tokenizer.save_pretrained(path)
    texts, others, rng = task.texts(rows, 1), task.texts(rows, 2), random.Random(0)
    pairs = [
        task.preference(a["prompt"], a["response"], b["response"], rng)
        for a, b in zip(texts, others, strict=True)
        if a["response"] != b["response"]
    ]
    # Prompts of many lengths, down to one word behind the BOS.
    prompts = [{"prompt": " ".join(r["prompt"].split()[: 1 + i % 8])} for i, r in enumerate(texts)]
    return TinyModels(
        policy=str(policy), dpo=str(dpo), dpo_ref=str(dpo_ref), reward=str(reward),
        prompts=write_rows(folder / "prompts.jsonl", prompts),
        pairs=write_rows(folder / "pairs.jsonl", pairs),
        texts=write_rows(folder / "texts.jsonl", texts),
    )  # fmt: skip


def small_run(tiny: TinyModels, output_dir: Path | str, **settings) -> dict[str, object]:
    """Keyword arguments of an RTOConfig that runs in a second or two an iteration."""
    return {
        "policy": tiny.policy, "dpo_model": tiny.dpo, "reward_model": (tiny.reward,), "data": tiny.prompts,
        "output_dir": str(output_dir), "dtype": "fp32", "rollout_batch": 8, "train_batch": 4, "iterations": 2,
        "max_prompt_length": 16, "max_response_length": 12, "gradient_checkpointing": False, "data_cache": False,
        "data_workers": 1, "report_samples": 2,
    } | settings  # fmt: skip


# Launches


@dataclass(frozen=True)
class Result:
    """What a launch left behind."""

    returncode: int
    """That of the first rank that failed (negative: killed by that signal), else 0."""
    output: str
    """stdout and stderr of all ranks, as they came."""


class Launch:
    """`python args` on `ranks` ranks over gloo, each in a session of its own; ended when one of them fails."""

    def __init__(self, args: Sequence[str | Path], *, ranks: int, log: Path, env: dict[str, str] | None = None) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        path = [ROOT / "kernels", ROOT, ROOT / "tests", os.environ.get("PYTHONPATH", "")]
        base = {k: v for k, v in os.environ.items() if k not in RENDEZVOUS} | {
            "PYTHONPATH": os.pathsep.join(str(p) for p in path if str(p)),
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1",
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        self.log = log
        with log.open("wb") as sink:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, *map(str, args)], env=base | {"RANK": str(r), "LOCAL_RANK": str(r)} | (env or {}),
                    stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
                )
                for r in range(ranks)
            ]  # fmt: skip

    def wait(self, timeout_s: float = 300) -> Result:
        """Until all ranks have ended, or one has failed (the others get a few seconds); kills at the time limit."""
        deadline, failed = time.monotonic() + timeout_s, 0
        while any(p.poll() is None for p in self.processes):
            codes = [p.poll() for p in self.processes]
            if not failed and any(codes):
                failed = next(c for c in codes if c)
                deadline = min(deadline, time.monotonic() + 10)
            if time.monotonic() > deadline:
                self.kill()
                if not failed:
                    raise TimeoutError(f"no end after {timeout_s:g} s:\n{self.output()}")
            time.sleep(0.05)
        failed = failed or next((p.returncode for p in self.processes if p.returncode), 0)
        return Result(failed, self.output())

    def kill(self) -> None:
        """SIGKILL to every rank and what it started."""
        for p in self.processes:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)
        for p in self.processes:
            p.wait()

    def output(self) -> str:
        return self.log.read_text(errors="replace")


# Looking into engines


@contextlib.contextmanager
def watched_gradients(engine) -> Iterator[dict]:
    """Fills a dict with the full fp32 gradients (checkpoint name -> tensor) that each optimiser step starts from."""
    from deepspeed.utils import safe_get_full_grad

    model = getattr(engine.model, "lm", None) or engine.model.classifier
    step, seen = engine.deepspeed.step, {}

    def watched() -> None:
        for name, p in model.named_parameters():
            seen[name] = safe_get_full_grad(p).detach().float().cpu().clone()
        step()

    engine.deepspeed.step = watched
    try:
        yield seen
    finally:
        engine.deepspeed.step = step
