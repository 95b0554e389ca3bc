"""What of an adapter counts as arrived in vLLM's layers, and which adapters go there at all; no vLLM is needed."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rto_fast.errors import SyncError
from rto_fast.models.adapters import AdapterForm
from rto_fast.rollout.vllm_engines import load_adapter
from rto_fast.rollout.vllm_engines.load_adapter import layer_rank, receive_adapter
from rto_fast.rollout.vllm_engines.support import no_form
from rto_fast.rollout.weights.fingerprint import Fingerprint

SCALE = 32 / 3
SENT = {
    f"base_model.model.{module}.lora_{half}.weight": torch.full(shape, value)
    for module, value in (("q_proj", 0.1), ("k_proj", 0.2), ("o_proj", 0.3))
    for half, shape in (("A", (3, 8)), ("B", (8, 3)))
}


class Layer(nn.Module):
    """One of vLLM's layers: `parts` matrices of the checkpoint that it keeps as one."""

    def __init__(self, *parts: str) -> None:
        super().__init__()
        self.parts, self.held = parts, []

    def set_lora(self, index, lora_a, lora_b):
        self.held = [lora_a, lora_b]


class Worker:
    """A worker that loads adapters as vLLM's does, but for `spoil`."""

    def __init__(self, spoil=lambda a, b: (a, b)) -> None:
        self.model, self.device, self.spoil = nn.Sequential(Layer("q_proj", "k_proj"), Layer("o_proj")), "cpu", spoil
        self.model_runner, self.seen = SimpleNamespace(get_model=lambda: self.model), None

    def add_lora(self, folder: str) -> None:
        path = Path(folder)
        self.seen = (path, stat.S_IMODE(path.stat().st_mode), json.loads((path / "adapter_config.json").read_text()))
        loaded = load_file(path / "adapter_model.safetensors")
        for layer in self.model:
            halves = [[loaded[f"base_model.model.{part}.lora_{h}.weight"] for part in layer.parts] for h in "AB"]
            a, b = self.spoil(halves[0], [one * SCALE for one in halves[1]])
            layer.set_lora(0, *((a, b) if len(layer.parts) > 1 else (a[0], b[0])))


@pytest.fixture(autouse=True)
def by_folder(monkeypatch):
    monkeypatch.setattr(load_adapter, "request", lambda path, **_: path)


def test_what_the_layers_took_is_told_and_nothing_is_left_behind():
    worker, received = Worker(), Fingerprint()
    receive_adapter(worker, SENT.items(), {"r": 3}, SCALE, received)
    sent = Fingerprint()
    for name, tensor in SENT.items():
        sent.add(name, tensor)
    assert received.digests() == sent.digests()
    folder, mode, settings = worker.seen
    assert (mode, settings) == (0o700, {"r": 3})
    assert not folder.exists()
    assert all("set_lora" not in vars(layer) for layer in worker.model)


@pytest.mark.parametrize(
    "spoil",
    [lambda a, b: (a, [b[0], *b[:-1]]), lambda a, b: ([a[0], *a[:-1]], b), lambda a, b: (a, [x / SCALE for x in b]),
     lambda a, b: (a, [b[0] if i else None for i in range(len(b))])],
)  # fmt: skip
def test_a_tensor_that_no_layer_took_is_named(spoil):
    worker = Worker(spoil)
    with pytest.raises(SyncError, match=r"_proj\.lora_[AB]\.weight: no layer of vLLM's took it; use --lora-push"):
        receive_adapter(worker, SENT.items(), {}, SCALE, Fingerprint())
    assert not worker.seen[0].exists()
    assert all("set_lora" not in vars(layer) for layer in worker.model)


def test_ranks_that_vllm_has():
    assert [layer_rank(n) for n in (1, 2, 16, 17, 512, 513)] == [1, 8, 16, 32, 512, 0]
    plain = AdapterForm({"r": 3, "lora_alpha": 32, "use_rslora": False}, {}, "")
    assert plain.scale == SCALE
    assert AdapterForm({"r": 16, "lora_alpha": 32, "use_rslora": True}, {}, "").scale == 8
    assert no_form(plain) == ""
    assert no_form(AdapterForm({"r": 3}, {}, "DoRA")) == "vLLM's LoRA has no DoRA"
    assert no_form(AdapterForm({"r": 600}, {}, "")) == "vLLM's LoRA has no rank of 600"
