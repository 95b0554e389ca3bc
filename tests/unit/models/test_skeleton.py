"""What ranks get of a model that rank 0 has loaded."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
import torch
from launches import Launch
from loop_helpers import ROOT, save_llama
from safetensors.torch import load_file, save_file

from rto_fast.models.attention import PACKED
from rto_fast.models.load import load_policy, load_scalar
from rto_fast.models.skeleton import _revived, _skeleton

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize("kind", ["untied", "tied", "scalar"])
def test_a_skeleton_is_the_model_without_its_weights(tiny, tmp_path, kind):
    loading = {"dtype": torch.bfloat16, "attention": PACKED, "argument": "model"}
    if kind == "scalar":
        model = load_scalar(tiny.reward, **loading)
    else:
        save_llama(tmp_path, seed=0, vocab=4000, ids=IDS, tied=kind == "tied", hidden_size=128)
        model = load_policy(str(tmp_path), **loading)
    model.eval()
    data = _skeleton(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert kind == "scalar" or len(data) < weights / 10
    made = _revived(data)
    assert type(made) is type(model)
    assert not any(m.training for m in made.modules())
    assert [(n, p.shape, p.dtype) for n, p in made.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in model.named_parameters()
    ]
    assert all(p.untyped_storage().nbytes() == p.element_size() for p in made.parameters())
    buffers = dict(made.named_buffers())
    assert buffers
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    if kind == "scalar":
        assert (made.mean, made.std) == (model.mean, model.std) == (0.3, 1.7)
    else:
        embedding, head = made.lm.get_input_embeddings().weight, made.lm.get_output_embeddings().weight
        assert (embedding is head) == (kind == "tied")
        assert made.lm.generation_config == model.lm.generation_config


@pytest.fixture(scope="module")
def errors(tiny, tmp_path_factory):
    """[a reward model without head, one with a torn file, a fault of rank 0] -> [rank] -> (type, message)."""
    folder = tmp_path_factory.mktemp("refused")
    headless, torn = folder / "headless", folder / "torn"
    for target in (headless, torn):
        shutil.copytree(tiny.reward, target)
    weights = load_file(headless / "model.safetensors")
    save_file({n: t for n, t in weights.items() if "score" not in n}, headless / "model.safetensors", {"format": "pt"})
    content = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(content[: len(content) // 2])
    models = [dataclasses.replace(tiny, reward=str(path)) for path in (headless, torn)]
    texts = json.dumps([json.dumps(dataclasses.asdict(m)) for m in models])
    worker = ROOT / "tests" / "loading_worker.py"
    result = Launch([worker, "refused", texts, folder / "found.pt"], ranks=2, log=folder / "log").wait(120)
    assert result.returncode == 0, result.output
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize(("case", "message"), [(0, "reward_model: .*headless.* has no reward head"),
                                               (1, "reward_model: .*torn.* does not load: ")])  # fmt: skip
def test_ranks_refuse_together_what_rank_0_refuses(errors, case, message):
    first, second = errors[case]
    assert first == second
    assert first[0] == "ConfigError"
    assert re.match(message, first[1]), first[1]


def test_a_fault_of_rank_0_ends_every_rank(errors):
    assert errors[2] == [("MemoryError", "no room"), ("RuntimeError", "rank 0 could not load a model: no room")]
