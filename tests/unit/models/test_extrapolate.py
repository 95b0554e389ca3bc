"""Weights beyond a model: the tensors, the policy that they make, and input that cannot work."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from loop_helpers import save_llama, save_moved
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rto_fast import commands
from rto_fast.errors import ConfigError
from rto_fast.models.extrapolate import ExtrapolateConfig, extrapolate


def beyond(new, old, to, alpha=0.3):
    return extrapolate(ExtrapolateConfig(new=str(new), old=str(old), to=str(to), alpha=alpha))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_in_shards_and_everything_else_of_new(dtype, tiny, tmp_path):
    """new in several files, old in one of fp32: names, dtype, config, tokenizer are new's."""
    model = AutoModelForCausalLM.from_pretrained(tiny.dpo, dtype=dtype)
    model.save_pretrained(tmp_path / "new", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(tiny.dpo).save_pretrained(tmp_path / "new")
    (tmp_path / "new" / "pytorch_model.bin").write_bytes(b"old weights of another format")
    made = beyond(tmp_path / "new", tiny.policy, tmp_path / "made", 0.7)
    files = sorted(p.name for p in made.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(p.name for p in made.iterdir()) == sorted(
        p.name for p in (tmp_path / "new").iterdir() if p.suffix != ".bin"
    )
    old = load_file(f"{tiny.policy}/model.safetensors")
    for name in files:
        result, new = load_file(made / name), load_file(tmp_path / "new" / name)
        assert result.keys() == new.keys()
        for key, tensor in result.items():
            exact = 1.7 * new[key].double() - 0.7 * old[key].double()
            assert tensor.dtype == dtype
            error = 2e-6 if dtype == torch.float32 else 2**-8
            torch.testing.assert_close(tensor.double(), exact, rtol=error, atol=error)
    AutoModelForCausalLM.from_pretrained(made)


def test_alpha_0_is_new_and_minus_1_is_old(tiny, tmp_path):
    for alpha, path in ((0.0, tiny.dpo), (-1.0, tiny.policy)):
        made = load_file(beyond(tiny.dpo, tiny.policy, tmp_path / f"made{alpha}", alpha) / "model.safetensors")
        for name, tensor in load_file(f"{path}/model.safetensors").items():
            torch.testing.assert_close(made[name], tensor, atol=0 if alpha == 0 else 1e-7, rtol=0)


def test_of_models_that_differ_in_their_heads_it_is_the_momentum_step_itself(tmp_path):
    """Logits are then linear in the weights: pi ~ new * (new / old)^alpha after every prefix of a tiny vocabulary."""
    vocab, ids = 5, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    tokenizer = tmp_path / "tokens"
    for name, seed in (("old", 1), ("new", 2)):
        save_llama(tmp_path / name, seed=1, vocab=vocab, ids=ids)
        weights = load_file(tmp_path / name / "model.safetensors")
        noise = torch.randn(weights["lm_head.weight"].shape, generator=torch.Generator().manual_seed(seed))
        weights["lm_head.weight"] = weights["lm_head.weight"] + 0.3 * noise
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
        plain_tokenizer(tokenizer, vocab).save_pretrained(tmp_path / name)
    made = beyond(tmp_path / "new", tmp_path / "old", tmp_path / "made", 0.8)
    every = torch.tensor(list(itertools.product(range(vocab), repeat=3)))
    new, old, result = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64)(every).logits.log_softmax(-1)
        for p in (tmp_path / "new", tmp_path / "old", made)
    )
    torch.testing.assert_close(result, (new + 0.8 * (new - old)).log_softmax(-1), atol=1e-5, rtol=0)
    assert (result - new).abs().max() > 0.05


def plain_tokenizer(folder, vocab):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


def renamed(folder, tmp_path, change):
    shutil.copytree(folder, tmp_path / "changed")
    file = tmp_path / "changed" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    return str(tmp_path / "changed")


def overflow(weights):
    weights["lm_head.weight"][0, 0] = 3e38


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("lm_head.weight"), "old: new has a tensor 'lm_head.weight' that old lacks"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(90, 32)}), r"old: lm_head.weight has the shape \[90, 32\]"),
        (overflow, "alpha: 5 takes lm_head.weight beyond torch.float32"),
        (
            lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to(torch.float8_e4m3fn)}),
            "lm_head.weight cannot be added",
        ),
        (lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to(torch.int8)}), "lm_head.weight cannot be added"),
    ],
)
def test_models_that_do_not_fit(change, message, tiny, tmp_path):
    old = renamed(tiny.policy, tmp_path, change)
    with pytest.raises(ConfigError, match=message):
        beyond(tiny.dpo, old, tmp_path / "made", 5.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["changed"]


def test_other_input_that_cannot_work(tiny, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny.policy, other)
    tokens = json.loads((other / "tokenizer.json").read_text())
    a, b = list(tokens["model"]["vocab"])[10:12]
    vocab = tokens["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    empty = tmp_path / "empty"
    save_moved(tiny.policy, empty, seed=1, by=0.0)
    (empty / "model.safetensors").unlink()
    for settings, message in (
        ({"old": str(other)}, "old: .* has another tokenizer than new"),
        ({"old": "hub/name"}, "old: 'hub/name' is no folder; fetch a model of the Hub first: hf download hub/name"),
        ({"new": str(empty)}, "new: .* holds no weights"),
        ({"alpha": float("inf")}, "alpha: must be a number, got inf"),
        ({"to": str(other)}, "to: .* exists already"),
        ({"to": ""}, "to: missing; pass --to"),
    ):
        base = {"new": tiny.dpo, "old": tiny.policy, "to": str(tmp_path / "made")}
        with pytest.raises(ConfigError, match=message):
            extrapolate(ExtrapolateConfig(**(base | settings)))
    assert not (tmp_path / "made").exists()


def test_as_a_command(tiny, tmp_path, capsys):
    flags = ["--new", tiny.dpo, "--old", tiny.policy, "--alpha", "0.5", "--to", str(tmp_path / "made")]
    commands.main(["extrapolate", *flags])
    assert "1.5 * new - 0.5 * old" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        commands.main(["extrapolate", *flags])
    assert stopped.value.code == 2
    assert "exists already" in capsys.readouterr().err
