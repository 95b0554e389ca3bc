"""Loading and exporting: head names, missing heads, normalisation, the critic's start, other tokenizers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from loop_helpers import run_with, save_llama, small_run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from rto_fast import distributed, trainer
from rto_fast.config import RTOConfig
from rto_fast.data.chat_template import load_template
from rto_fast.errors import ConfigError, StorageError
from rto_fast.models import save
from rto_fast.models.attention import PACKED
from rto_fast.models.load import _load, check_reward_head, check_weights, load_policy, load_scalar, new_scalar
from rto_fast.models.packing import PackedBatch, Placement
from rto_fast.models.save import export, save_model
from rto_fast.supervised.reward_model import start_of

LOADING = {"dtype": torch.float32, "attention": PACKED, "argument": "reward_model"}
TOKENS = [torch.tensor([1, 9, 12, 30, 31]), torch.tensor([1, 40, 41])]


def copy_with(source: str, target: Path, **renamed: str | None) -> str:
    """The model at `source` with tensors renamed by prefix (None: left out)."""
    shutil.copytree(source, target)
    state = {}
    for name, tensor in load_file(target / "model.safetensors").items():
        new = next((r and name.replace(p, r) for p, r in renamed.items() if name.startswith(p + ".")), name)
        if new:
            state[new] = tensor
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def scores(model) -> torch.Tensor:
    batch = PackedBatch.make(TOKENS, [1, 1], torch.device("cpu"), "sdpa")
    with torch.no_grad():
        return model(batch, batch.last_positions)


def test_scores_are_normalised_by_the_stored_statistics(tiny):
    """(raw - mean) / std of transformers' own classifier at the last token."""
    raw = AutoModelForSequenceClassification.from_pretrained(tiny.reward, num_labels=1)
    with torch.no_grad():
        expected = torch.cat([raw.score(raw.model(t[None]).last_hidden_state[:, -1])[0] for t in TOKENS])
    config = json.loads((Path(tiny.reward) / "config.json").read_text())
    assert (config["mean"], config["std"]) == (0.3, 1.7)
    torch.testing.assert_close(scores(load_scalar(tiny.reward, **LOADING)), (expected - 0.3) / 1.7)


def test_openrlhfs_head_name(tiny, tmp_path):
    other = copy_with(tiny.reward, tmp_path / "value_head", score="value_head")
    assert torch.equal(scores(load_scalar(other, **LOADING)), scores(load_scalar(tiny.reward, **LOADING)))


def test_a_missing_head_is_an_error(tiny, tmp_path):
    headless = copy_with(tiny.reward, tmp_path / "headless", score=None)
    with pytest.raises(ConfigError, match=r"reward_model: .*headless.*no reward head.*score and value_head"):
        load_scalar(headless, **LOADING)


@pytest.mark.parametrize("value", [None, "0.3", True, float("nan")])
@pytest.mark.parametrize("name", ["mean", "std"])
def test_statistics_that_are_no_numbers(tiny, tmp_path, name, value):
    folder = tmp_path / "reward"
    shutil.copytree(tiny.reward, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    for call in (lambda: check_reward_head(str(folder), "reward_model"), lambda: load_scalar(str(folder), **LOADING)):
        with pytest.raises(ConfigError, match=rf"reward_model: .* has {name} .* in its config.json, .*delete mean and"):
            call()


def test_a_reward_model_that_is_trained_on_keeps_its_head(tiny, capsys):
    """Its raw scores are those before; any other model gets a new head. Which one, is said."""
    loading = {"dtype": torch.float32, "attention": PACKED}
    kept, before = start_of(tiny.reward, loading), load_scalar(tiny.reward, **LOADING)
    assert torch.equal(kept.classifier.score.weight, before.classifier.score.weight)
    torch.testing.assert_close(scores(kept), scores(before) * before.std + before.mean)
    assert f"reward head: that of the reward model {tiny.reward}" in capsys.readouterr().out
    new = start_of(tiny.policy, loading)
    assert not torch.equal(new.classifier.score.weight, before.classifier.score.weight)
    assert f"reward head: a new one on {tiny.policy}" in capsys.readouterr().out


@pytest.mark.parametrize("whole", [True, False])
def test_adapters_beside_whole_weights_or_without_a_base_are_refused(tiny, tmp_path, whole):
    folder = tmp_path / "merged"
    shutil.copytree(tiny.policy, folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not whole:
        (folder / "config.json").unlink()
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    remedy = "delete the adapter's files" if whole else "set base_model_name_or_path"
    for load in (load_policy, load_scalar):
        with pytest.raises(ConfigError, match=rf"reward_model: '.*merged' .*{remedy}"):
            load(str(folder), **LOADING)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["x"]}', "\xff", "[" * 10**5]
)
def test_a_malformed_index(tiny, tmp_path, text):
    shutil.copytree(tiny.policy, tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"policy: '.*index.json' is no readable index .*fetch the file again"):
        check_weights(str(tmp_path / "model"), "policy")


def test_a_language_model_is_no_reward_model(tiny):
    with pytest.raises(ConfigError, match="no reward head"):
        load_scalar(tiny.policy, **LOADING)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_dropout_is_off(tiny, tmp_path, family):
    """In training a policy gives the log-probs that it was scored with, dropout by modules (GPT-2) or functions."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 87, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**sizes)),
        "gpt_neox": lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(**sizes, intermediate_size=64, attention_dropout=0.5, hidden_dropout=0.5)
        ),
    }[family]()
    model.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), **LOADING)
    batch = PackedBatch.make(TOKENS, [1, 1], torch.device("cpu"), "sdpa")
    with torch.no_grad():
        trained, scored = (policy.train(mode)(batch)[0] for mode in (True, False))
    assert torch.equal(trained, scored)


def test_critic_starts_from_the_reward_model_in_its_units(one_rank, tiny, tmp_path, capsys):
    run = run_with(tiny, tmp_path / "run")
    assert f"critic: starts from the reward model {tiny.reward}" in capsys.readouterr().out
    assert torch.equal(scores(run.critic.model), scores(load_scalar(tiny.reward, **LOADING)))


@pytest.mark.parametrize("source", ["model", "function"])
def test_critic_starts_from_the_policy_with_a_zero_head(one_rank, tiny, tmp_path, capsys, source):
    """Where it is asked for, and where no reward model is there."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    function = {"reward_model": (), "reward_fn": (f"{rewards}:length",)}
    run = run_with(tiny, tmp_path / "run", **({"critic": "policy"} if source == "model" else function))
    assert f"the policy's backbone {tiny.policy} with a zero head" in capsys.readouterr().out
    assert scores(run.critic.model).abs().max() == 0
    backbone = load_file(Path(tiny.policy) / "model.safetensors")
    assert all((t == backbone[n]).all() for n, t in run.critic.weights() if n.startswith("model."))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_exports_load_where_they_should(tiny, tmp_path, tied, stage):
    """Policy in AutoModelForCausalLM with the trained model's log-probs, critic in its own class, tied or not."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    ids = {n: getattr(tokenizer, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    start = tmp_path / "start"
    save_llama(start, seed=1, vocab=len(tokenizer), ids=ids, tied=tied)
    tokenizer.save_pretrained(start)
    settings = small_run(tiny, tmp_path / "run", prompt_key="prompt", policy_lr=1e-2, zero_stage=stage, iterations=1)
    run = trainer.train(RTOConfig(**(settings | {"policy": str(start), "dpo_model": str(start)})))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    assert exported.config.tie_word_embeddings is tied
    trained = dict(run.policy.weights())
    assert trained.keys() == dict(exported.named_parameters()).keys()
    first = AutoModelForCausalLM.from_pretrained(start)
    moved = 0
    for (name, tensor), before in zip(exported.named_parameters(), first.parameters(), strict=True):
        moved += int(not torch.equal(tensor, before))
        for key, own in run.policy.weights():
            if key == name:
                assert torch.equal(tensor, own), name
    assert moved > 0
    critic = load_scalar(str(tmp_path / "run" / "critic"), **LOADING)
    assert (critic.mean, critic.std) == (0.3, 1.7)


def with_generation_config(source: str, target: Path, **settings) -> str:
    shutil.copytree(source, target)
    path = target / "generation_config.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | settings))
    return str(target)


def test_sampling_settings_of_a_policy_that_samples_nothing_do_not_stop_its_export(tiny, tmp_path):
    """`do_sample: false` beside a temperature, as on the Hub: transformers loads it and refuses to save it."""
    path = with_generation_config(tiny.policy, tmp_path / "policy", do_sample=False, temperature=0.6, top_p=0.9)
    raw = AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(ValueError, match="temperature"):
        raw.save_pretrained(tmp_path / "raw")
    policy = load_policy(path, **LOADING)
    export(policy, tmp_path / "out", write=True)
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept.get("do_sample", False) is False
    assert not {"temperature", "top_p"} & kept.keys()
    assert kept["eos_token_id"] == raw.generation_config.eos_token_id


def test_what_cannot_be_exported_ends_a_run_before_its_first_step(one_rank, tiny, tmp_path, monkeypatch):
    """With nothing written: here a tokenizer that cannot be saved."""

    def refuse(*args, **kw):
        raise OSError("no such codec")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", refuse)
    with pytest.raises(ConfigError, match="would write at its end cannot be written: no such codec"):
        run_with(tiny, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    assert not list(tmp_path.glob("run/*.jsonl"))


def tiny_export(tiny, folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    model = load_policy(tiny.policy, **LOADING)
    save_model(model, folder, tokenizer, load_template("plain", tokenizer), writes=True)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_exported_files_have_the_umasks_mode(tiny, tmp_path, mask):
    before = os.umask(mask)
    try:
        tiny_export(tiny, tmp_path / "policy")
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "policy").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_an_export_appears_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    """What fails on the way leaves the export that was there, and nothing else."""
    tiny_export(tiny, tmp_path / "policy")
    (tmp_path / "policy" / "mark").touch()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(save, "save_tokenizer", full)
        for name in ("policy", "other"):
            with pytest.raises(
                StorageError, match=rf"{name} cannot be written: No space left.*was saved before is whole"
            ):
                tiny_export(tiny, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    assert (tmp_path / "policy" / "mark").exists()
    tiny_export(tiny, tmp_path / "policy")
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    assert not (tmp_path / "policy" / "mark").exists()


def test_a_least_length_where_every_token_ends_is_refused(one_rank, tiny, tmp_path):
    policy = with_generation_config(tiny.policy, tmp_path / "policy", eos_token_id=list(range(87)))
    with pytest.raises(ConfigError, match="min_response_length: each of the model's 87 tokens ends a response"):
        run_with(tiny, tmp_path / "run", policy=policy, min_response_length=3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("home", "ranks", "kind", "straight"),
    [
        ("device", 1, "cuda", True),
        ("device", 8, "cuda", True),
        ("host", 1, "cuda", False),
        ("rank 0", 8, "cuda", False),
        ("rank 0", 1, "cuda", True),
        ("device", 8, "cpu", False),
    ],
)
@pytest.mark.parametrize("loader", [load_policy, load_scalar, new_scalar])
def test_weights_are_read_past_the_host_where_they_stay_whole(tiny, monkeypatch, loader, home, ranks, kind, straight):
    asked = {}

    def from_pretrained(*_, **settings):
        asked.update(settings)
        raise OSError("seen")

    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    monkeypatch.setattr(distributed, "broadcast_object", lambda item: item)
    placement = Placement(torch.device(kind), "sdpa", lockstep=False, micro_tokens=100)
    with pytest.raises(ConfigError, match="does not load: seen"):
        loader(tiny.reward, placement=placement, home=home, **LOADING)
    assert asked.get("device_map") == ({"": torch.device("cuda")} if straight else None)


def test_transformers_reads_weights_straight_to_a_device(tiny):
    """On a device that is always there, and holds nothing."""
    model, _ = _load(
        AutoModelForCausalLM, tiny.policy, "policy", Placement(torch.device("meta"), "sdpa", False, 100), "device"
    )
    assert {p.device.type for p in model.parameters()} == {"meta"}
