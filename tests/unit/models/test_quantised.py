"""Models in 8 and 4 bits compute what their decoded matrices do, which are what the codes' definitions say."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from loop_helpers import save_llama, stand_in_code

from rto_fast.errors import ConfigError
from rto_fast.memory.command import MemoryConfig
from rto_fast.memory.phases import frozen_bytes
from rto_fast.memory.shapes import shape_of
from rto_fast.models import quantised
from rto_fast.models.attention import PACKED
from rto_fast.models.load import load_policy, load_scalar, new_scalar
from rto_fast.models.packing import PackedBatch
from rto_fast.models.quantised import CODES, QuantisedLinear, check_code, quantise
from rto_fast.models.save import export

LOADING = {"dtype": torch.float32, "attention": PACKED, "argument": "model"}
NF4 = torch.tensor([
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302, 0.2461123,
    0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
])  # fmt: skip
"""Levels of arXiv 2305.14314, appendix E."""


def off_int8(weight: torch.Tensor, found: torch.Tensor) -> float:
    """How far `found` is from int8, in steps of its row: more than a half where a code is not the nearest."""
    step = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-9) / 127
    assert ((found / step).round() - found / step).abs().max() < 0.1  # a multiple of the step, fp16's rounding aside
    return max(
        0.0, float(((found - weight).abs() / step).max()) - 0.55
    )  # coded from fp16, whose rounding is 127 / 2048


def off_nf4(weight: torch.Tensor, found: torch.Tensor) -> float:
    """How far `found` is from the nearest level of each number."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    wanted = (NF4[((blocks / scale)[..., None] - NF4).abs().argmin(dim=-1)] * scale).view(weight.shape)
    return float((found - wanted).abs().max())


def off_bf16(weight: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - weight.bfloat16().float()).abs().max())


@pytest.fixture(params=["stand-in", "int8", "nf4"])
def kind(request, monkeypatch):
    """(name, how far a decoded matrix is from its definition); a stand-in runs where bitsandbytes is not installed."""
    if request.param == "stand-in":
        monkeypatch.setitem(CODES, "int8", stand_in_code(torch.bfloat16))
        return "int8", off_bf16
    pytest.importorskip("bitsandbytes")
    return request.param, {"int8": off_int8, "nf4": off_nf4}[request.param]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A Llama with rows of 32 numbers, half a block of nf4, and a row of zeros."""
    root = tmp_path_factory.mktemp("model")
    save_llama(root / "lm", seed=1, vocab=87, ids={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    model = load_policy(str(root / "lm"), **LOADING)
    model.lm.model.layers[0].mlp.gate_proj.weight.data[3] = 0
    export(model, root / "zero", write=True)
    return str(root / "zero")


def batch() -> PackedBatch:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(4, 87, (n,), generator=generator) for n in (9, 4, 13)]
    return PackedBatch.make(drawn, [2, 1, 5], torch.device("cpu"), "sdpa")


@torch.no_grad()
@pytest.mark.parametrize("scalar", [False, True], ids=["causal", "scalar"])
def test_a_model_computes_what_its_decoded_matrices_do(folder, tmp_path, kind, scalar):
    name, off = kind
    if scalar:
        export(new_scalar(folder, head_std=0.5, **LOADING), tmp_path, write=True)
    load, path = (load_scalar, str(tmp_path)) if scalar else (load_policy, folder)
    ours, wanted, row = quantise(load(path, **LOADING), name, "model"), load(path, **LOADING), batch()
    read = (lambda m: m(row, row.last_positions)) if scalar else (lambda m: m(row))
    whole = read(wanted)
    coded = {n: m for n, m in ours.inner.named_modules() if isinstance(m, QuantisedLinear)}
    plain = {n: m for n, m in wanted.inner.named_modules() if type(m) is torch.nn.Linear and n != "score"}
    assert coded.keys() == plain.keys()
    assert len(coded) == 2 * 7
    for n, module in plain.items():
        decoded = coded[n].code.decode(coded[n].codes, coded[n].scales, module.weight.shape, torch.float32)
        assert off(module.weight, decoded) < 2e-3
        module.weight.data = decoded
    assert not wanted.inner.model.layers[0].mlp.gate_proj.weight[3].any()
    assert (read(ours) - read(wanted)).abs().max() < 1e-5
    assert (read(ours) - whole).abs().max() > 1e-4
    kept = dict(ours.named_parameters())
    assert all(torch.equal(p, dict(wanted.named_parameters())[n]) for n, p in kept.items())
    config = dataclasses.replace(MemoryConfig(), frozen_dtype=name, dtype="fp32")
    held = [*ours.parameters(), *(b for n, b in ours.named_buffers() if n.endswith(("codes", "scale_bytes")))]
    expected = frozen_bytes(config, shape_of(path, "model", scalar=scalar))
    assert sum(t.numel() * t.element_size() for t in held) == expected


def test_a_missing_package_is_named(monkeypatch):
    check_code("off")
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^frozen_dtype: nf4 needs bitsandbytes; pip install 'rto-fast\[quant\]'"):
        check_code("nf4")
    with pytest.raises(ConfigError, match=r"^lora_base_dtype: int8 needs .* or use --lora-base-dtype off"):
        check_code("int8", "lora_base_dtype")


def test_a_model_without_linear_maps_is_refused(tmp_path):
    """GPT-2's maps are none of torch's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {"vocab_size": 87, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**settings)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"frozen_dtype: reference \(GPT2LMHeadModel\) has no linear map"):
        quantise(load_policy(str(tmp_path), **LOADING), "int8", "reference")
