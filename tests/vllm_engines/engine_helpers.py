"""What the tests of vLLM engines share: sizes that vLLM takes, runs, what they wrote, and pushes that go wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from loop_helpers import small_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rto_fast.config import RTOConfig
from rto_fast.rollout.vllm_engines.colocated import VLLMEngine
from rto_fast.rollout.vllm_engines.support import installed

CPU = torch.device("cpu")
MARKS = [
    pytest.mark.vllm,
    pytest.mark.skipif(not installed(), reason="vLLM is not installed (make install-vllm)"),
]
VLLM = {"rollout_engine": "vllm", "vllm_max_sequences": 16, "policy_lr": 0.01}
RESUMABLE = {"iterations": 3, "save_every": 1, "resume": "auto"}
HEADS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""The smallest heads that vLLM's attention on a CPU has."""
ROUNDING = 5e-5
"""Nats by which fp32 log-probs of these models may differ from fp64; on one kind of processor it was 2.4e-5."""


def moved(path: str, by: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(path)
    return {n: p.detach() * (1 + by * torch.randn(p.shape, generator=generator)) for n, p in model.named_parameters()}


def run_of(models, folder: Path, **settings) -> RTOConfig:
    return RTOConfig(**small_run(models, folder, **(VLLM | {"iterations": 3} | settings)))


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]


def figures(folder: Path) -> list[dict]:
    """The metrics that two equal runs share."""
    measured = ("time/", "rate/", "memory/", "run/", "sync/seconds")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows(folder)]


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def skipped(monkeypatch, engine_class=VLLMEngine):
    """The second push of the run says that all went well and does nothing."""
    plain, last = engine_class.push, []

    def push(engine, weights, version):
        if version > 1:
            engine.version = version
            return last[-1]
        last.append(plain(engine, weights, version))
        return last[-1]

    monkeypatch.setattr(engine_class, "push", push)


def partial(monkeypatch, engine_class=VLLMEngine):
    """One matrix of a fused one does not arrive."""
    plain = engine_class.push

    def push(engine, weights, version):
        kept = ((n, t) for n, t in weights if engine.version < 1 or not n.endswith("1.mlp.up_proj.weight"))
        return plain(engine, kept, version)

    monkeypatch.setattr(engine_class, "push", push)


def stale(monkeypatch, engine_class=VLLMEngine):
    """The engine gets the weights of the push before."""
    plain, kept = engine_class.push, []

    def push(engine, weights, version):
        now = [(n, t.clone()) for n, t in weights]
        kept.append(now)
        return plain(engine, iter(kept[-2] if engine.version >= 1 else now), version)

    monkeypatch.setattr(engine_class, "push", push)
