"""When two tokenizers are one: ordinary tokens, their rules, and the special tokens that a run uses."""

from __future__ import annotations

import re

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rto_fast.data.chat_template import load_template
from rto_fast.data.tokenizer import end_of_turn, special_tokens_used, tokenizer_difference

WORDS = ["a", "b", "c", "ab", "Ġ", "Ġa", "Ġb"]
MERGES = [("a", "b"), ("Ġ", "a"), ("Ġ", "b")]
SPECIAL = ["<|begin|>", "<|turn|>", "<|eot|>", "<|reserved_0|>", "<|reserved_1|>"]
TEMPLATE = (
    "<|begin|>{% for m in messages %}<|turn|>{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>{% endif %}"
)


def stand_in(special=SPECIAL, words=WORDS, merges=MERGES, plain=(), normalizer=None, split=False):
    """A byte-level BPE as Llama-3's, small."""
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=split)
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken(t, special=True) for t in special])
    backend.add_tokens([AddedToken(t, special=False) for t in plain])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=special[0], eos_token=special[2])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def used(tokenizer, prompts=()):
    template = load_template("auto", tokenizer)
    return special_tokens_used(tokenizer, template, [tokenizer.eos_token_id], prompts)


def test_what_a_run_uses():
    tokenizer = stand_in()
    assert used(tokenizer) == {"<|begin|>", "<|turn|>", "<|eot|>"}
    reserved = tokenizer.convert_tokens_to_ids("<|reserved_1|>")
    assert used(tokenizer, [[0, 1], [2, reserved]]) == {"<|begin|>", "<|turn|>", "<|eot|>", "<|reserved_1|>"}


def test_names_of_unused_special_tokens_do_not_matter():
    """Llama-3 has <|reserved_special_token_2|> where Llama-3.2 has <|finetune_right_pad_id|>."""
    ours, theirs = stand_in(), stand_in([*SPECIAL[:3], "<|pad|>", "<|tool|>"])
    assert ours.backend_tokenizer.to_str() != theirs.backend_tokenizer.to_str()
    assert tokenizer_difference(ours, theirs, used(ours)) == ""
    assert tokenizer_difference(theirs, ours, used(theirs)) == ""


def test_padding_and_truncation_do_not_matter():
    ours, theirs = stand_in(), stand_in()
    theirs.backend_tokenizer.enable_padding(length=9)
    theirs.backend_tokenizer.enable_truncation(3)
    assert ours.backend_tokenizer.to_str() != theirs.backend_tokenizer.to_str()
    assert tokenizer_difference(ours, theirs, used(ours)) == ""


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"special": ["<|begin|>", "<|eot|>", "<|turn|>", *SPECIAL[3:]]}, r"special token '<\|eot\|>' .* 9 and 8"),
        ({"special": ["<|begin|>", "<|turn|>", "<|end|>", *SPECIAL[3:]]}, r"special token '<\|eot\|>' .* 9 and none"),
        ({"words": ["b", "a", *WORDS[2:]]}, "the token 'a' has the ids 0 and 1"),
        ({"plain": ["<tool>"]}, "the token '<tool>' has the ids none and 12"),
        ({"merges": [*MERGES[1:], MERGES[0]]}, "their merges differ"),
        ({"normalizer": normalizers.Lowercase()}, "their normalizers differ"),
        ({"split": True}, "their pre-tokenizers differ"),
    ],
)  # fmt: skip
def test_what_gives_other_ids_is_named(changes, why):
    ours, theirs = stand_in(), stand_in(**changes)
    found = tokenizer_difference(ours, theirs, used(ours))
    assert re.search(why, found), found


def test_a_special_token_in_a_prompt_counts():
    ours, theirs = stand_in(), stand_in([*SPECIAL[:3], "<|pad|>", "<|tool|>"])
    reserved = ours.convert_tokens_to_ids("<|reserved_0|>")
    assert tokenizer_difference(ours, theirs, used(ours, [[0, 1]])) == ""
    assert "'<|reserved_0|>'" in tokenizer_difference(ours, theirs, used(ours, [[0, reserved]]))


@pytest.mark.parametrize("behind", ["", "\n", "\n<|reserved_0|>", "<|reserved_0|>\n<|reserved_1|>\n"])
def test_a_response_ends_with_the_first_token_that_stops_sampling(behind):
    """Whatever a template writes behind its end of turn: in all stages, for reward models too."""
    tokenizer = stand_in()
    tokenizer.chat_template = TEMPLATE.replace("<|eot|>", "<|eot|>" + behind)
    template = load_template("auto", tokenizer)
    _, tail = template.encode_pair(tokenizer, "a b", "ab b")
    assert tokenizer.decode(tail) == "ab b<|eot|>"
    assert template.text_of(tokenizer, "a b") == f"<|begin|><|turn|>a b<|eot|>{behind}<|turn|>"
    assert end_of_turn(tokenizer, template) == tokenizer.convert_tokens_to_ids("<|eot|>")
