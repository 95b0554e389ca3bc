"""Adapters that do not fit, and flags of adapters that cannot work."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from refusal_helpers import REFUSED, message_of
from safetensors.torch import load_file, save_file

from rto_fast.config import ALL_LINEAR, Lora
from rto_fast.data.tokenizer import load_tokenizer
from rto_fast.export import main as export_main
from rto_fast.models.attention import PACKED
from rto_fast.models.load import load_policy
from rto_fast.models.save import export

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_rank")
RECIPES = ("sft_llama3.py", "rm_llama3.py", "dpo_llama3.py")


@pytest.fixture
def adapter(tiny, tmp_path) -> Path:
    """An adapter of rank 4 on a copy of the tiny policy, which lies in `tmp_path / "base"`."""
    shutil.copytree(tiny.policy, tmp_path / "base")
    lora = Lora(4, 32, 0.0, (ALL_LINEAR,), False, False, 0)
    loading = {"dtype": torch.float32, "attention": PACKED, "argument": "model"}
    export(load_policy(str(tmp_path / "base"), lora=lora, **loading), tmp_path / "adapter", write=True)
    load_tokenizer(tiny.policy).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_rank": -1}, "lora_rank: must not be negative"),
        ({"lora_rank": 4, "lora_alpha": 0}, "lora_alpha: must be at least 1"),
        ({"lora_rank": 4, "lora_dropout": 1.0}, r"lora_dropout: must lie in \[0, 1\)"),
        ({"lora_rank": 4, "lora_lr": 0.0}, "lora_lr: must be positive"),
        ({"lora_dora": True}, "lora_dora: is for adapters; pass --lora-rank"),
        ({"lora_targets": "q_proj"}, "lora_targets: is for adapters; pass --lora-rank"),
        ({"lora_base_dtype": "nf4"}, "lora_base_dtype: is for adapters; pass --lora-rank"),
        ({"lora_base_dtype": "nf4", "lora_rank": 4, "lora_dora": True}, "lora_dora: reads the base's weights at every"),
        (
            {"lora_base_dtype": "int8", "lora_rank": 4, "zero_stage": 3},
            "lora_base_dtype: int8 weights cannot be spread over ranks; leave out --zero-stage 3",
        ),
    ],
)
def test_flags_that_cannot_work(refused, flags, message):
    for recipe in RECIPES:
        refused(recipe, message, **flags)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "q_porj",
            r"lora_targets: model \(Llama.*\) has no module 'q_porj'; did you mean q_proj\? there are down_",
        ),
        ("mlp", r"lora_targets: 'mlp' \(LlamaMLP\) of model cannot be adapted: it is no linear map; there are"),
        ("embed_tokens", r"lora_targets: 'embed_tokens' \(Embedding\) of model cannot be adapted: it is no linear map"),
    ],
)
def test_modules_that_cannot_be_adapted(run, settings, target, message):
    for recipe in RECIPES:
        code, _, stderr = run(recipe, "--lora-targets", target, lora_rank=4)
        assert re.search(message, message_of(stderr)), stderr
        assert code == REFUSED
        assert not (Path(settings[recipe]["output_dir"]) / "run.json").exists()


def test_the_head_is_left_out(run):
    for recipe, head in (("sft_llama3.py", "lm_head"), ("rm_llama3.py", "score")):
        code, _, stderr = run(recipe, "--lora-targets", head, lora_rank=4)
        assert f"lora_targets: {head!r}" in message_of(stderr)
        assert "cannot be adapted: it is the head" in stderr
        assert code == REFUSED


def test_an_adapter_of_another_rank_or_kind(refused, adapter):
    for recipe in RECIPES:
        refused(recipe, r"model: '.*adapter' is an adapter with r 4, and --lora-rank 8 is asked for; pass --lora-ra",
                model=adapter, lora_rank=8)  # fmt: skip
        refused(
            recipe, r"adapter with lora_alpha 32, and --lora-alpha 16 is", model=adapter, lora_rank=4, lora_alpha=16
        )
        refused(
            recipe, r"adapter with use_dora False, and --lora-dora True", model=adapter, lora_rank=4, lora_dora=True
        )


def test_an_adapter_of_another_base(refused, adapter, tiny):
    """Known by the fingerprint of the base's weights."""
    weights = adapter.parent / "base" / "model.safetensors"
    shutil.copy(Path(tiny.dpo) / "model.safetensors", weights)
    message = r"'.*adapter' is an adapter of another base: model.safetensors of '.*base' has other contents than in its"
    for recipe in RECIPES:
        refused(recipe, f"model: {message}", model=adapter)
        refused(recipe, f"model: {message}", model=adapter, lora_rank=4)
    refused("dpo_llama3.py", f"reference: {message}", reference=adapter)
    for argument in ("policy", "reference", "dpo_model"):
        refused("rto_llama3.py", f"{argument}: {message}", **{argument: adapter})


def test_an_adapter_that_does_not_fit_its_base(run, adapter, settings):
    """One without a record is judged by its shapes."""
    (adapter / "rto_adapter.json").unlink()
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(n for n in tensors if "q_proj.lora_A" in n)
    for change_one in (lambda t: t | {name: torch.zeros(4, 99)}, lambda t: {k: v for k, v in t.items() if k != name}):
        save_file(change_one(tensors), adapter / "adapter_model.safetensors")
        code, _, stderr = run("sft_llama3.py", model=adapter)
        assert "is an adapter of another base than" in message_of(stderr)
        assert code == REFUSED
        assert not (Path(settings["sft_llama3.py"]["output_dir"]) / "run.json").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.copy(f.parent / "base" / "config.json", f), "holds whole weights and an adapter"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "holds adapter_config.json and no adapter_model.safet"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "is no readable safetensors file"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read .*write the adapter anew"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "holds no JSON object"),
        (lambda f: change(f / "adapter_config.json", peft_type="IA3"), "an adapter of the kind 'IA3'"),
        (lambda f: change(f / "adapter_config.json", base_model_name_or_path=None), "does not name its base"),
        (lambda f: change(f / "adapter_config.json", base_model_name_or_path=str(f)), "its base .* is an adapter too"),
        (lambda f: shutil.rmtree(f.parent / "base"), "no base of the adapter '.*' at '.*base'.*; set base_model_name"),
    ],
)
def test_folders_that_are_no_whole_adapter(refused, adapter, spoil, message):
    spoil(adapter)
    for recipe in RECIPES:
        refused(recipe, f"model: .*{message}", model=adapter)
    refused("rto_llama3.py", f"reward_model: .*{message}", reward_model=adapter)


def test_a_language_models_adapter_is_no_reward_model(refused, adapter):
    refused("rto_llama3.py", r"reward_model: '.*adapter' has no reward head", reward_model=adapter)


def test_a_model_that_peft_does_not_know(run, tiny, monkeypatch):
    """Whatever PEFT raises becomes one line."""
    import peft

    def unknown(*_, **__):
        raise ValueError("Target module Strange() is not supported.")

    monkeypatch.setattr(peft, "inject_adapter_in_model", unknown)
    code, _, stderr = run("sft_llama3.py", lora_rank=4)
    assert "lora_rank: PEFT cannot adapt model" in message_of(stderr)
    assert "Strange() is not supported" in stderr
    assert code == REFUSED


def test_without_peft_adapters_say_what_to_install(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    code, _, stderr = run("sft_llama3.py", lora_rank=4)
    assert "lora_rank: adapters need peft; pip install 'rto-fast[train]'" in message_of(stderr)
    assert code == REFUSED


def test_export_of_an_adapter_asks_what_is_meant(adapter, tmp_path, capfd):
    assert export_main([str(adapter), "--to", str(tmp_path / "out")]) == REFUSED
    assert "is an adapter already; pass --merge" in message_of(capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_rank": 4, "lora_dropout": 0.1}, "lora_dropout: 0.1 would make PPO's first ratio another number than 1"),
        ({"lora_rank": 4, "ema_decay": 0.9}, "ema_decay: averages whole weights"),
        ({"lora_rank": 4, "lora_policy_lr": 0.0}, "lora_policy_lr: must be positive"),
        ({"lora_dora": True}, "lora_dora: is for adapters; pass --lora-rank"),
    ],
)
def test_flags_of_the_loop_that_cannot_work(refused, flags, message):
    for recipe in ("rto_llama3.py", "ppo_llama3.py"):
        refused(recipe, message, **flags)


def test_a_policy_of_another_rank(refused, adapter):
    refused("rto_llama3.py", r"policy: '.*adapter' is an adapter with r 4, and --lora-rank 8 is", policy=adapter,
            lora_rank=8)  # fmt: skip
