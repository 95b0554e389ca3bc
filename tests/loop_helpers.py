"""Tiny models and data for the tests of the training loop.

Everything is made on the spot from random weights, so that nothing has to be downloaded.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


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


def save_tagger(folder: Path, source: str, *, bias: float) -> str:
    """A reward model as a token-classification model of one output, whose head has a bias; the folder's path."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForTokenClassification"], "mean": 0.0, "std": 1.0}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"score.bias": torch.tensor([bias])}, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


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

    from rto_fast.demo.tiny_task import make_task

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


def run_with(tiny: TinyModels, folder: Path, **settings):
    """The run of a `small_run` on rows {prompt}, built and not begun."""
    from rto_fast import build
    from rto_fast.config import RTOConfig

    return build.build(RTOConfig(**small_run(tiny, folder, prompt_key="prompt", **settings)))


def stand_in_code(dtype):
    """A way to hold matrices (models/quantised.py) that casts them; fp32 leaves an fp32 run's bits as they are.

    For where bitsandbytes is not installed.
    """
    import torch

    from rto_fast.models.quantised import Code

    return Code(
        lambda weight: (weight.to(dtype), torch.zeros(0)), lambda codes, scales, shape, wanted: codes.to(wanted),
        lambda numbers, rows: float(numbers * dtype.itemsize), needs="torch",
    )  # fmt: skip


# Looking into engines


@contextlib.contextmanager
def watched_gradients(engine) -> Iterator[dict]:
    """Fills a dict with the full fp32 gradients (checkpoint name -> tensor) that each optimiser step starts from."""
    from deepspeed.utils import safe_get_full_grad

    model = engine.model.inner
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
