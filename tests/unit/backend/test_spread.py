"""Models that rank 0 loads for all ranks: the same bits, the same errors, and one copy in host memory."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import START, Launch, environment
from loading_worker import CASES
from loop_helpers import ROOT, TinyModels, make_tiny_models
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

WORKER = ROOT / "tests" / "loading_worker.py"


def in_other_formats(models: TinyModels, folder: Path) -> TinyModels:
    """The policy in several files behind an index and in bf16, the reward model as a .bin."""
    policy, reward = folder / "policy", folder / "reward"
    for source, target in ((models.policy, policy), (models.reward, reward)):
        shutil.copytree(source, target)
        (target / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(models.policy, dtype=torch.bfloat16)
    model.save_pretrained(policy, max_shard_size="10KB")
    assert len(list(policy.glob("*.safetensors"))) > 2
    scalar = AutoModelForSequenceClassification.from_pretrained(models.reward, num_labels=1)
    torch.save(scalar.state_dict(), reward / "pytorch_model.bin")
    return dataclasses.replace(models, policy=str(policy), reward=str(reward))


@pytest.fixture(scope="module")
def seen(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread")
    tied = in_other_formats(make_tiny_models(folder / "tied", rows=8, tied=True), folder)
    paths = json.dumps([json.dumps(dataclasses.asdict(models)) for models in (tiny, tied)])
    result = Launch([WORKER, "bits", paths, folder / "found.pt"], ranks=2, log=folder / "log").wait()
    assert result.returncode == 0, result.output
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize(("models", "stage", "dtype"), CASES)
def test_spread_models_are_those_that_deepspeed_takes_apart(seen, models, stage, dtype):
    """The second models have a tied head, files behind an index, a .bin, and weights in another dtype than the run."""
    spread, whole = (seen[f"{models} {stage} {dtype} {way}"] for way in ("spread", "whole"))
    for ours, theirs in zip(spread, whole, strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
    name = "policy model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(spread[0][name], spread[2][name]), "the update moved nothing"


@pytest.mark.slow
def test_one_copy_of_a_model_lies_in_host_memory_while_it_is_loaded(tiny, tmp_path, monkeypatch):
    """193 MiB in fp32 from bf16 files, partitioned on two ranks: rank 0 holds them once, the other its half."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed leaves the process
    size = save_wide(tmp_path / "large")
    large = dataclasses.replace(tiny, policy=str(tmp_path / "large"))
    paths = json.dumps([json.dumps(dataclasses.asdict(models)) for models in (large, tiny)])
    found = fresh_ranks("peak", paths, tmp_path / "found.pt")
    part = size / 2
    assert sum(found["spread, load"]) < 1.6 * size, "bf16 files that are mapped, and their fp32 on rank 0"
    assert found["spread, load"][1] < 0.1 * size
    assert found["spread, all"][0] < 1.6 * size
    assert found["spread, all"][1] < 1.2 * part
    assert sum(found["whole, load"]) > 2.9 * size, "two copies and the files would show"


def fresh_ranks(mode: str, paths: str, target: Path) -> Any:
    """What the worker finds on two ranks whose malloc has this environment's settings."""
    command = [sys.executable, "-c", START, "2", WORKER, mode, paths, target]
    fresh = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stdout + fresh.stderr
    return torch.load(target)


@pytest.mark.slow
def test_host_memory_of_a_build_is_what_the_arithmetic_says(tiny, tmp_path, monkeypatch):
    """Policy, sampler, reference and DPO model of 230 MB each, all ranks together at their peak."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    large = make_tiny_models(
        tmp_path / "models", rows=8, hidden_size=768, intermediate_size=2048, num_hidden_layers=8,
        num_attention_heads=12, num_key_value_heads=4,
    )  # fmt: skip
    paths = json.dumps([json.dumps(dataclasses.asdict(models)) for models in (large, tiny)])
    measured, expected = fresh_ranks("host", paths, tmp_path / "found.pt")
    print(f"HOST {measured / 2**20:.0f} MiB, {expected / 2**20:.0f}")
    assert measured == pytest.approx(expected, rel=0.1)


def save_wide(folder: Path) -> int:
    """A random Llama in bf16; bytes of its weights in fp32."""
    config = AutoConfig.for_model(
        "llama", vocab_size=87, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return 4 * sum(p.numel() for p in model.parameters())
