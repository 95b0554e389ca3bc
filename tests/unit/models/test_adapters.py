"""An adapter computes what its merged model does, and other programs read the folders that are written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loop_helpers import save_llama
from safetensors.torch import load_file

from rto_fast.config import ALL_LINEAR, Lora
from rto_fast.models.adapters import merged_parameters, twin
from rto_fast.models.attention import PACKED
from rto_fast.models.load import load_policy, load_scalar, new_scalar
from rto_fast.models.packing import PackedBatch
from rto_fast.models.save import export

peft = pytest.importorskip("peft")
LOADING = {"dtype": torch.float32, "attention": PACKED, "argument": "model"}
LENS, PROMPTS = (9, 4, 13), [2, 1, 5]
KINDS = {"plain": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "some": {"targets": ("q_proj", "down_proj")}}


def lora(**settings) -> Lora:
    return Lora(**({"rank": 3, "alpha": 8, "dropout": 0.0, "targets": (ALL_LINEAR,), "rslora": False, "dora": False,
                    "seed": 0} | settings))  # fmt: skip


def sequences(vocab: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, vocab, (n,), generator=generator) for n in LENS]


def packed(vocab: int = 87) -> PackedBatch:
    return PackedBatch.make(sequences(vocab), PROMPTS, torch.device("cpu"), "sdpa")


def moved(model, by: float = 0.2):
    """The model with noise on all that training would change, as if it had been trained."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += by * torch.randn(p.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """Folders of untied and tied Llamas, and of a GPT-2, whose maps are no nn.Linear."""
    from transformers import GPT2Config, GPT2LMHeadModel

    root, ids = tmp_path_factory.mktemp("bases"), {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    save_llama(root / "untied", seed=1, vocab=87, ids=ids)
    save_llama(root / "tied", seed=1, vocab=87, ids=ids, tied=True)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=87, n_positions=64, n_embd=32, n_layer=2, n_head=4, **ids)).save_pretrained(
        root / "gpt2"
    )
    return {name: str(root / name) for name in ("untied", "tied", "gpt2")}


def alone(lm) -> torch.Tensor:
    """Log-probs of the response tokens as transformers' model finds them in each sequence by itself."""
    out = []
    for tokens, n in zip(sequences(87), PROMPTS, strict=True):
        logits = lm(input_ids=tokens[None]).logits[0]
        out.append(logits[n - 1 : -1].log_softmax(-1).gather(1, tokens[n:, None])[:, 0])
    return torch.cat(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["untied", "tied"])
def test_packed_logps_are_those_of_the_merged_model(bases, tmp_path, base, kind):
    """As it is trained, merged when loaded, merged by PEFT, and read by transformers alone: fp32, 1e-5."""
    from transformers import AutoModelForCausalLM

    model = moved(load_policy(bases[base], lora=lora(**KINDS[kind]), **LOADING))
    before = load_policy(bases[base], **LOADING)(packed())
    export(model, tmp_path, write=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "generation_config.json", "rto_adapter.json"
    ]  # fmt: skip
    ours = model(packed())
    assert (ours - before).abs().max() > 0.1  # the adapter does something
    merged = load_policy(str(tmp_path), **LOADING)
    assert merged.adapter is None
    assert all(p.requires_grad for p in merged.parameters())
    again = load_policy(str(tmp_path), lora=lora(**KINDS[kind]), **LOADING)
    assert torch.equal(again(packed()), ours)
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[base]), tmp_path)
    theirs = {"PEFT": alone(plain), "PEFT merged": alone(plain.merge_and_unload()), "ours merged": merged(packed())}
    if kind != "dora":  # whose magnitudes transformers looks for by another name than PEFT writes
        theirs["transformers"] = alone(AutoModelForCausalLM.from_pretrained(tmp_path))
    for name, logps in theirs.items():
        assert (ours - logps).abs().max() < 1e-5, name


def test_weights_that_are_no_linear_modules(bases, tmp_path):
    """GPT-2 keeps its matrices transposed."""
    model = moved(load_policy(bases["gpt2"], lora=lora(), **LOADING))
    export(model, tmp_path, write=True)
    merged = load_policy(str(tmp_path), **LOADING)
    assert (model(packed()) - merged(packed())).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["untied", "tied", "gpt2"])
def test_merged_parameters_leave_the_model_as_it_is(bases, tmp_path, base, kind):
    """They are the merged model's, by the base's names, and not one bit of the base has moved."""
    if base == "gpt2" and kind == "some":
        pytest.skip("GPT-2 has other names")
    model = moved(load_policy(bases[base], lora=lora(**KINDS[kind]), **LOADING))
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = {name: t.clone() for name, t in merged_parameters(model.inner)}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    export(model, tmp_path, write=True)
    wanted = dict(load_policy(str(tmp_path), **LOADING).inner.named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("base", ["untied", "tied"])
def test_reward_models_keep_their_head_beside_the_adapter(bases, tmp_path, base):
    """Plain PEFT reads adapter and head; mean and std come back; a second training goes on from both."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = moved(new_scalar(bases[base], head_std=0.1, lora=lora(), **LOADING))
    model.mean, model.std = 0.3, 1.7
    export(model, tmp_path, write=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    batch = packed()
    ours = model(batch, batch.last_positions)
    for settings in ({}, {"lora": lora()}):
        again = load_scalar(str(tmp_path), **settings, **LOADING)
        assert (again.mean, again.std) == (0.3, 1.7)
        assert (again(batch, batch.last_positions) - ours).abs().max() < 1e-5
    assert again.inner.score.weight.requires_grad
    classifier = AutoModelForSequenceClassification.from_pretrained(bases[base], num_labels=1)
    plain = peft.PeftModel.from_pretrained(classifier, tmp_path)
    theirs = torch.cat([plain(input_ids=tokens[None]).logits[0] for tokens in sequences(87)])
    assert (theirs - (ours * 1.7 + 0.3)).abs().max() < 1e-5


def test_a_new_adapter_changes_nothing_and_alone_is_trained(bases):
    for kind in KINDS.values():
        model = load_policy(bases["tied"], lora=lora(**kind), **LOADING)
        assert (model(packed()) - load_policy(bases["tied"], **LOADING)(packed())).abs().max() < 1e-6
        model(packed()).sum().backward()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
        assert all(".lora_" in name for name in trained)
        assert not any("lm_head" in name or "embed" in name for name in trained)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_twin_stands_on_the_same_weights_and_stays(bases, tmp_path, fresh):
    """Of a new adapter it is the base, bit for bit; of one that goes on, the model before training."""
    base = load_policy(bases["tied"], **LOADING)
    model = load_policy(bases["tied"], lora=lora(), **LOADING)
    if not fresh:
        export(moved(model), tmp_path, write=True)
        model = load_policy(str(tmp_path), lora=lora(), **LOADING)
    wanted = base(packed()) if fresh else model(packed()).detach()
    other = twin(model)
    moved(model)
    assert torch.equal(other(packed()), wanted)
    assert not torch.equal(model(packed()), wanted)
    places = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    assert {p.data_ptr() for p in other.parameters()} >= places


def test_whole_weights_need_no_peft(bases):
    """Not even where it is not installed."""
    code = f"""
import sys
sys.modules["peft"] = None
import torch
import rto_fast.supervised.dpo, rto_fast.trainer, rto_fast.export
from rto_fast.models.load import load_policy
load_policy({bases["tied"]!r}, dtype=torch.float32, attention="sdpa", argument="model")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_ranks_of_the_same_seed_begin_alike(bases):
    first, second = (load_policy(bases["tied"], lora=lora(), **LOADING).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = load_policy(bases["tied"], lora=lora(seed=1), **LOADING).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_bf16_adapters_have_the_models_dtype(bases, tmp_path):
    model = load_policy(bases["untied"], lora=lora(), **LOADING | {"dtype": torch.bfloat16})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    export(model, tmp_path, write=True)
    assert {t.dtype for t in load_file(Path(tmp_path) / "adapter_model.safetensors").values()} == {torch.bfloat16}
