"""Sources of token rewards, teachers and verifiers that do not fit: refused before any model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("one_rank")
RTO, DISTILL, RLVR = "rto_llama3.py", "distill.py", "rlvr_math.py"


@pytest.fixture
def foreign(tiny, tmp_path) -> Path:
    """A language model whose tokenizer has two words exchanged: as many tokens, and others."""
    folder = shutil.copytree(tiny.dpo, tmp_path / "foreign")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    (a, i), (b, j) = list(words.items())[-2:]
    words[a], words[b] = j, i
    path.write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("source", ["logratio:{}", "logratio:{good}:{}", "logratio:reference:{}", "endogenous:{}"])
def test_a_language_model_of_other_tokens(refused, tiny, foreign, altered, source):
    """Another tokenizer of the same size, and a vocabulary of another size, in every place of a source."""
    larger = altered(tiny.dpo, vocab_size=200)
    for model, why in ((foreign, "another tokenizer than the policy"), (larger, "a vocabulary of 200 tokens, the pol")):
        named = source.format(model, good=tiny.dpo)
        refused(RTO, f"token_reward: '{model}' has {why}", token_reward=("dpo", named))


def test_a_scalar_model_that_does_not_fit(refused, tiny, foreign, altered):
    smaller = altered(tiny.reward, vocab_size=50)
    shutil.copy(foreign / "tokenizer.json", (other := altered(tiny.reward)))
    twice = altered(tiny.reward)
    weights = load_file(twice / "model.safetensors")
    weights["score.weight"] = weights["score.weight"].repeat(2, 1)
    save_file(weights, twice / "model.safetensors", {"format": "pt"})
    for model, why in (
        (smaller, f"'{smaller}' has a vocabulary of 50 tokens"), (other, f"'{other}' has another tokenizer"),
        (twice, f"'{twice}' gives 2 numbers a token, not one"), (tiny.dpo, f".*'{tiny.dpo}' has no reward head"),
    ):  # fmt: skip
        for kind in ("scalar", "scalar-diff"):
            refused(RTO, f"token_reward: {why}", token_reward=(f"{kind}:{model}",))


def test_a_dpo_model_or_a_teacher_of_other_tokens(refused, tiny, foreign, altered):
    refused(RTO, "dpo_model: .*foreign' has another tokenizer", dpo_model=(tiny.dpo, str(foreign)))
    refused(DISTILL, "token_reward: .*foreign' has another tokenizer", teacher=str(foreign))
    refused(DISTILL, "token_reward: .* has a vocabulary of 200", teacher=altered(tiny.dpo, vocab_size=200))
    refused(DISTILL, "reference: .*", base=altered(tiny.dpo, vocab_size=200))


FLAGS = {
    "too few weights": (RTO, {"token_reward": ("dpo", "endogenous"), "token_reward_weight": (1.0,)},
                        "token_reward_weight: 1 weights for 2 sources"),
    "too many weights": (RTO, {"token_reward_weight": (1.0, 2.0)}, "token_reward_weight: 2 weights for 1 sources"),
    "too few weights of DPO models": (RTO, {"dpo_model": ("a", "b"), "dpo_weight": (1.0,)},
                                      "dpo_weight: 1 weights for 2 DPO models"),
    "no alpha": (RTO, {"token_reward": ("endogenous",), "token_reward_alpha": 0.0},
                 "token_reward_alpha: must be positive, got 0"),
    "a negative alpha": (RTO, {"token_reward": ("endogenous",), "token_reward_alpha": -1.0},
                         "token_reward_alpha: must be positive, got -1"),
    "no scale": (DISTILL, {"scale": 0.0}, "scale: must be positive, got 0"),
    "a negative scale": (DISTILL, {"scale": -0.5}, "scale: must be positive, got -0.5"),
    "no teacher": (DISTILL, {"teacher": ""}, "teacher: no model given; pass --teacher"),
    "no such teacher": (DISTILL, {"teacher": "/no/such"}, "token_reward: .*no model at '/no/such'"),
    "a column of RLVR's that is not there": (
        RLVR, {}, "reward_fn: .*last_number wants 'answer', and there are prompts, .* and the data's columns prompt"),
    "two online models": (RTO, {"online": "prime", "dpo_model": ("a", "b")}, "online: prime trains one DPO model"),
    "no rate online": (RTO, {"online": "prime", "online_lr": 0.0}, "online_lr: must be positive, got 0"),
    "q with rewards that are paid elsewhere": (
        RTO, {"advantage": "q", "responses_per_prompt": 2, "credit": "sentence"}, "credit: q takes a token's own"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_settings(refused, name):
    recipe, changed, message = FLAGS[name]
    refused(recipe, message, **changed)


def test_a_function_that_wants_a_column_that_is_not_there(refused, tmp_path):
    """It is named, and so are those that there are."""
    (tmp_path / "wants.py").write_text("def f(token_ids, answer):\n    return []\n")
    place, there = f"{tmp_path}/wants.py:f", "and there are prompts, .* and the data's columns prompt"
    refused(RTO, f"token_reward: .*wants.py:f wants 'answer', {there}", token_reward=("dpo", f"fn:{place}"))
    refused(RTO, f"reward_fn: .*wants.py:f wants 'answer', {there}", reward_fn=place)


def test_ppo_with_a_dpo_model(refused, tiny):
    refused(
        "ppo_llama3.py", "dpo_model: .* is not read by ppo; pass --beta1 above 0, or leave it out", dpo_model=tiny.dpo
    )
