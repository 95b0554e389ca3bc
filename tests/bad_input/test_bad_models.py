"""Models, tokenizers and templates that do not fit."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from refusal_helpers import REFUSED, message_of

pytestmark = pytest.mark.usefixtures("one_rank")


def test_tokenizer_that_does_not_fit_the_model(refused, tiny, altered):
    smaller = altered(tiny.policy, vocab_size=50)
    for recipe in ("sft_llama3.py", "rm_llama3.py", "dpo_llama3.py"):
        refused(recipe, r"model: the tokenizer has ids up to 86, the model has 50", model=smaller)
    refused("rto_llama3.py", r"policy: the tokenizer has ids up to 86, the model has 50", policy=smaller)
    refused("rto_llama3.py", r"reward_model: the tokenizer has ids up to 86, the model has 50",
            reward_model=altered(tiny.reward, vocab_size=50))  # fmt: skip
    no_tokenizer = altered(tiny.policy)
    for file in no_tokenizer.glob("tokenizer*"):
        file.unlink()
    refused("rm_llama3.py", rf"model: no tokenizer in '{no_tokenizer}'", model=no_tokenizer)


def test_vocabulary_of_another_size(refused, tiny, altered):
    larger = altered(tiny.dpo, vocab_size=200)
    message = rf"'{larger}' has a vocabulary of 200 tokens, the (policy|model)'s has 87"
    refused("dpo_llama3.py", f"reference: {message}", reference=larger)
    for argument in ("dpo_model", "dpo_ref", "reference"):
        refused("rto_llama3.py", f"{argument}: {message}", **{argument: larger})


def test_fewer_positions_than_the_policy(refused, tiny, altered):
    refused("rto_llama3.py", r"\(dpo_model\): 28 tokens exceed the model's 16 positions",
            dpo_model=altered(tiny.dpo, max_position_embeddings=16))  # fmt: skip
    refused("rto_llama3.py", r"\(reward_model\): 28 tokens exceed the model's 16 positions",
            reward_model=altered(tiny.reward, max_position_embeddings=16))  # fmt: skip
    refused("dpo_llama3.py", r"\(reference\): 64 tokens exceed the model's 16 positions",
            reference=altered(tiny.dpo, max_position_embeddings=16))  # fmt: skip


def test_template_of_another_run(refused, tiny, altered):
    other = altered(tiny.policy)
    (other / "rto_template.json").write_text(json.dumps({"hash": "a" * 64, "kind": "jinja"}))
    message = rf"'{other}' was trained with chat template a{{64}}, this run uses [0-9a-f]{{64}}; use the same --chat-te"
    for recipe in ("sft_llama3.py", "rm_llama3.py", "dpo_llama3.py"):
        refused(recipe, f"model: {message}", model=other)
    refused("dpo_llama3.py", f"reference: {message}", reference=other)
    for argument in ("policy", "dpo_model", "dpo_ref", "reference"):
        refused("rto_llama3.py", f"{argument}: {message}", **{argument: other})
    reward = altered(tiny.reward)
    shutil.copy(other / "rto_template.json", reward)
    refused("rto_llama3.py", r"reward_model: .* was trained with chat template a+", reward_model=reward)


def test_weights_that_are_not_there(refused, tiny, altered):
    """No weights, a torn file, a shard that the index names and the folder lacks: found before any data is read."""
    none, torn, lacking = (altered(tiny.dpo) for _ in range(3))
    (none / "model.safetensors").unlink()
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:5000])
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (lacking / "model.safetensors.index.json").write_text(json.dumps(index))
    for folder, message in (
        (none, r"holds no weights \(\*.safetensors or \*.bin\)"),
        (torn, r"model.safetensors' is no readable safetensors file"),
        (lacking, "lacks model-00001-of-00002.safetensors, which its index names"),
    ):
        refused("sft_llama3.py", rf"model: '{folder}.*{message}", model=folder)
        refused("dpo_llama3.py", rf"reference: '{folder}.*{message}", reference=folder)
        for argument in ("policy", "dpo_model", "dpo_ref", "reference"):
            refused("rto_llama3.py", rf"{argument}: '{folder}.*{message}", **{argument: folder})


def test_weights_in_another_format_that_do_not_load(run, tiny, altered, settings):
    """Only loading can judge them; still one message, and nothing written."""
    folder = altered(tiny.policy)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not tensors")
    code, _, stderr = run("rm_llama3.py", model=folder)
    assert re.search(rf"model: '{folder}' does not load: ", message_of(stderr))
    assert (code, settings["rm_llama3.py"]["output_dir"].exists()) == (REFUSED, False)


def test_reward_model_without_a_head(refused, tiny, altered):
    refused("rto_llama3.py", rf"reward_model: '{tiny.policy}' has no reward head \(looked for score and value_head\)",
            reward_model=tiny.policy)  # fmt: skip
    damaged = altered(tiny.reward)
    (damaged / "model.safetensors").write_bytes(b"not tensors")
    refused("rto_llama3.py", r"reward_model: .*is no readable safetensors file", reward_model=damaged)


def test_no_token_that_ends_a_response(refused, tiny, altered):
    endless = altered(tiny.policy, eos_token_id=None)
    (endless / "generation_config.json").unlink()
    tokenizer = json.loads((endless / "tokenizer_config.json").read_text())
    (endless / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": None}))
    refused("rto_llama3.py", "no response would ever stop", policy=endless)
