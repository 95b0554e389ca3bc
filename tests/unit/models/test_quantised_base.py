"""Adapters on a base in 8 and 4 bits: outputs and gradients are those of the decoded matrices, in fp64."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from loop_helpers import save_llama, stand_in_code
from test_adapters import alone, lora, moved, packed

from rto_fast.config import SFTConfig
from rto_fast.errors import ConfigError
from rto_fast.memory.command import MemoryConfig
from rto_fast.memory.phases import Models, weights_of
from rto_fast.memory.shapes import adapted, shape_of
from rto_fast.models import load
from rto_fast.models.adapters import form_of, merged_parameters, twin
from rto_fast.models.attention import PACKED
from rto_fast.models.load import load_policy, load_scalar, new_scalar
from rto_fast.models.one_base import OneBase
from rto_fast.models.packing import Placement
from rto_fast.models.quantised import CODES, QuantisedLinear, coded, numbers_of, quantise
from rto_fast.models.save import export

pytest.importorskip("peft")
LOADING = {"dtype": torch.float32, "attention": PACKED, "argument": "model"}


@pytest.fixture(params=["stand-in", "int8", "nf4"])
def kind(request, monkeypatch) -> str:
    """A code; a stand-in runs where bitsandbytes is not installed."""
    if request.param == "stand-in":
        monkeypatch.setitem(CODES, "int8", stand_in_code(torch.bfloat16))
        return "int8"
    pytest.importorskip("bitsandbytes")
    return request.param


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    save_llama(folder, seed=1, vocab=87, ids={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    return str(folder)


def truth(base: str, ours: torch.nn.Module, coefs: torch.Tensor, scale: float) -> tuple[torch.Tensor, dict]:
    """Log-probs, and the gradients of coefs . log-probs by A and B, of W + scale B A in fp64 with decoded W.

    By transformers' own model, one sequence after the other.
    """
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    leaves = {
        name: p.detach().double().requires_grad_() for name, p in ours.inner.named_parameters() if "lora_" in name
    }
    weights = {}
    for name, module in coded(ours.inner).items():
        weight = module.decoded(torch.float32).double()
        assert (weight - lm.get_submodule(name).weight).abs().max() > 1e-4, "the code has rounded nothing"
        if f"{name}.lora_A.default.weight" in leaves:
            a, b = (leaves[f"{name}.lora_{x}.default.weight"] for x in "AB")
            weight = weight + scale * b @ a
        weights[f"{name}.weight"] = weight

    logps = alone(lambda **inputs: torch.func.functional_call(lm, weights, kwargs=inputs))
    (coefs.double() @ logps).backward()
    return logps.detach(), {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj")], ids=["all", "some"])
def test_outputs_and_gradients_are_those_of_the_decoded_matrices(base, kind, targets):
    ours = moved(load_policy(base, lora=lora(base_dtype=kind, targets=targets), **LOADING))
    assert len(coded(ours.inner)) == 2 * 7, "all linear maps but the head, with an adapter or without"
    logps = ours(packed())
    coefs = torch.randn(logps.shape, generator=torch.Generator().manual_seed(3))
    (coefs @ logps).backward()
    wanted, gradients = truth(base, ours, coefs, scale=8 / 3)
    assert (logps.detach().double() - wanted).abs().max() < 2e-5
    trained = {name: p for name, p in ours.inner.named_parameters() if p.requires_grad}
    assert trained.keys() == gradients.keys()
    for name, p in trained.items():
        error = (p.grad.double() - gradients[name]).norm() / gradients[name].norm()
        assert error < 1e-5, (name, float(error))


def test_no_decoded_matrix_waits_for_the_backward(base, kind):
    """What autograd keeps are activations and adapters; with plain matrices it keeps those too."""
    shapes = []
    row = packed()
    for held in (kind, "off"):
        seen: list[torch.Size] = []
        model = load_policy(base, lora=lora(base_dtype=held), **LOADING)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(t.shape) or t, lambda t: t):
            model(row)
        shapes.append({tuple(sorted(shape)) for shape in seen})
    assert (32, 48) in shapes[1]
    assert (32, 48) not in shapes[0]


@torch.no_grad()
def test_a_push_is_of_decoded_matrices_with_the_adapter_merged(base, kind):
    """A whole model with the pushed weights answers as the policy does. The adapter alone would be another model's."""
    ours = moved(load_policy(base, lora=lora(base_dtype=kind), **LOADING))
    pushed = {name: tensor.clone() for name, tensor in merged_parameters(ours.inner)}
    plain = load_policy(base, **LOADING)
    assert pushed.keys() == dict(plain.inner.named_parameters()).keys()
    plain.inner.load_state_dict(pushed, strict=False)
    assert (plain(packed()) - ours(packed())).abs().max() < 1e-5
    assert form_of(ours).beyond == f"base in {kind} as the policy's is"
    assert form_of(load_policy(base, lora=lora(), **LOADING)).beyond == ""


@torch.no_grad()
def test_models_share_one_base_in_codes(base, kind, tmp_path):
    """Reference, DPO model, critic and reward model: the same codes in memory, outputs of models loaded alone."""
    asked = lora(base_dtype=kind)
    policy = load_policy(base, lora=asked, **LOADING)
    dpo, reward = moved(load_policy(base, lora=asked, **LOADING)), moved(new_scalar(base, lora=asked, **LOADING))
    export(dpo, tmp_path / "dpo", write=True)
    export(reward, tmp_path / "rm", write=True)
    assert json.loads((tmp_path / "dpo" / "rto_adapter.json").read_text())["base_dtype"] == kind
    one, row = OneBase(policy, base), packed()
    found = [one.language(base, "reference"), one.language(str(tmp_path / "dpo"), "dpo_model")]
    found += [one.scalar(str(tmp_path / "rm"), "reward_model"), one.scalar(base, "critic", asked, new=True)]
    codes = [{m.codes.data_ptr() for m in coded(model.inner).values()} for model in (policy, *found)]
    assert len(codes[0]) == 14
    assert all(places == codes[0] for places in codes)
    assert torch.equal(found[0](row), policy(row)), "the first KL is exactly 0"
    assert torch.equal(found[1](row), dpo(row))
    assert torch.equal(found[2](row, row.last_positions), reward(row, row.last_positions))
    dpo.adapter = dataclasses.replace(dpo.adapter, fresh=False)
    assert torch.equal(twin(dpo)(row), dpo(row))
    whole = load_scalar(str(tmp_path / "rm"), **LOADING)
    assert (whole(row, row.last_positions) - reward(row, row.last_positions)).abs().max() > 1e-5, "merged when loaded"


def test_scales_outlive_a_cast_and_a_checkpoint_has_no_base(base, kind):
    """DeepSpeed casts a model to bf16 whole."""
    model = load_policy(base, lora=lora(base_dtype=kind), **LOADING)
    before = {name: m.decoded(torch.float32) for name, m in coded(model.inner).items()}
    model.bfloat16()
    assert all(torch.equal(m.decoded(torch.float32), before[name]) for name, m in coded(model.inner).items())
    assert not [name for name in model.state_dict() if "codes" in name or "scale" in name]


def test_counted_bytes_are_those_that_are_held(base, kind):
    model = load_policy(base, lora=lora(base_dtype=kind), **LOADING)
    shape = adapted(shape_of(base, "policy"), base, "policy", lora())
    asked = dataclasses.replace(MemoryConfig(), lora_rank=3, lora_base_dtype=kind, dtype="fp32")
    buffers = [b for n, b in model.named_buffers() if n.endswith(("codes", "scale_bytes"))]
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *buffers])
    assert weights_of(asked, Models(shape, None, ()), 1) == {"policy weights": held}
    assert numbers_of(model) == shape.parameters + shape.adapter
    assert not any(isinstance(m, QuantisedLinear) for m in load_policy(base, lora=lora(), **LOADING).modules())


@pytest.mark.parametrize("what", ["policy", "new head", "reward model"])
def test_a_base_in_codes_never_lies_whole_on_the_device(base, what, tmp_path, monkeypatch):
    """Read to the host; while its maps are coded nothing else of it is on the device, here one without storage."""
    if what == "reward model":
        export(new_scalar(base, lora=lora(), **LOADING), tmp_path, write=True)
    placement = Placement(torch.device("meta"), "sdpa", lockstep=False, micro_tokens=64)
    monkeypatch.setattr(load, "_checked", lambda make, model, *_: make(model))  # which a meta tensor cannot pass
    models, seen, code = [], [], stand_in_code(torch.bfloat16)
    monkeypatch.setattr(load, "quantise", lambda model, *a: quantise(models.append(model) or model, *a))

    def encode(weight):
        seen.append((weight.device.type, {p.device.type for p in models[-1].parameters()}))
        return code.encode(weight)

    monkeypatch.setitem(CODES, "int8", dataclasses.replace(code, encode=encode))
    asked = LOADING | {"placement": placement, "home": "device", "lora": lora(base_dtype="int8")}
    model = {
        "policy": lambda: load_policy(base, **asked),
        "new head": lambda: new_scalar(base, **asked),
        "reward model": lambda: load_scalar(str(tmp_path), **asked),
    }[what]()
    assert seen == [("meta", {"cpu"})] * 14
    assert {t.device.type for n, t in model.named_parameters() if "lora_" not in n} == {"meta"}
    assert {t.device.type for t in model.buffers()} == {"meta"}


def test_a_model_without_linear_maps_is_refused(tmp_path, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.setitem(CODES, "int8", stand_in_code(torch.bfloat16))
    settings = {"vocab_size": 87, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**settings)).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^lora_base_dtype: model \(GPT2LMHeadModel\) has no linear map .*--lora-base-"
    ):
        load_policy(str(tmp_path), lora=lora(base_dtype="int8"), **LOADING)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 0}, "lora_base_dtype: is for adapters; pass --lora-rank"),
        ({"lora_dora": True}, "lora_dora: reads the base's weights at every step"),
        ({"zero_stage": 3}, "lora_base_dtype: nf4 weights cannot be spread over ranks; leave out --zero-stage 3"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    plain = {"model": "m", "data": "d", "output_dir": "o", "lora_rank": 4, "lora_base_dtype": "nf4"}
    SFTConfig(**plain).validate()
    with pytest.raises(ConfigError, match=f"^{message}"):
        SFTConfig(**plain | settings).validate()
