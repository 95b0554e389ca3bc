"""Prompts and responses as token ids: the plain template and Jinja ones, on real and on tiny tokenizers."""

from __future__ import annotations

import json
import resource
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor

import jinja2
import pytest
from loop_helpers import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from rto_fast.config import RunConfig
from rto_fast.data import bounds
from rto_fast.data.chat_template import TEMPLATE_FILE, check_template, load_template, save_template
from rto_fast.data.tokenizer import check_max_length, check_vocabulary, load_tokenizer, stop_token_ids
from rto_fast.errors import ConfigError

SHARED = ROOT.parent / "shared"
STORIES = SHARED / "models" / "stories260k"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES}")

LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' %}{{ (bos_token if loop.index0 == 0 else '') + text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BARE = "{% for m in messages %}{{ m['role'] + '> ' + m['content'] + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}assistant>{% endif %}"
)
THINKING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n\n</think>\n\n' }}{% endif %}")
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who barks?"},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "And who purrs?"},
]


def byte_tokenizer(chat_template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 400 ids whose EOS is <|eos|>, with the end-of-turn tokens of the templates above."""
    names = [
        "<|bos|>",
        "<|eos|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["once upon a time there was a dog who barked at the cat"] * 9, trainer)
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"} | special
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=names, clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = chat_template
    return tokenizer


# ---------------------------------------------------------------------------------------------- plain


@needs_stories
@pytest.mark.parametrize(
    ("prompt", "response", "joined"),
    [
        ("Once there was a dog", "who barked.", "Once there was a dog who barked."),
        ("Once there was a dog", " who barked.", "Once there was a dog who barked."),
        ("Once there was a dog ", "who barked.", "Once there was a dog who barked."),
        ("Once there was a dog\n", "who barked.", "Once there was a dog\nwho barked."),
        ("Once", "\n\nThere was a dog", "Once\n\nThere was a dog"),
    ],
)
def test_plain_strings(prompt, response, joined):
    tokenizer = load_tokenizer(str(STORIES))
    template = load_template("auto", tokenizer)
    assert template.source == "plain"
    prompt_ids, response_ids = template.encode_pair(tokenizer, prompt, response)
    assert prompt_ids == template.encode_prompt(tokenizer, prompt)
    assert prompt_ids == [1, *tokenizer(prompt, add_special_tokens=False).input_ids]
    assert response_ids[-1] == 2
    assert response_ids.count(2) == 1
    assert tokenizer.decode(prompt_ids[1:] + response_ids[:-1], clean_up_tokenization_spaces=False) == joined
    assert template.text_of(tokenizer, prompt, response) == joined


@needs_stories
def test_plain_response_goes_on_as_one_text_would():
    """The response's ids are those of the whole story behind the prompt's: no doubled space, no other split."""
    tokenizer = load_tokenizer(str(STORIES))
    template = load_template("plain", tokenizer)
    _, response_ids = template.encode_pair(tokenizer, "Once there was a dog", "a big dog")
    whole = tokenizer("Once there was a dog a big dog", add_special_tokens=False).input_ids
    assert response_ids == [*whole[len(tokenizer("Once there was a dog").input_ids) :], 2]


def test_plain_token_across_the_border():
    """A prompt keeps its ids although another response would merge with its end."""
    tokenizer = byte_tokenizer()
    template = load_template("auto", tokenizer)
    prompt_ids, response_ids = template.encode_pair(tokenizer, "once upon a ", "time")
    alone = tokenizer("once upon a ", add_special_tokens=False).input_ids
    assert tokenizer("once upon a time").input_ids[: len(alone)] != alone
    assert prompt_ids == [tokenizer.bos_token_id, *alone]
    assert tokenizer.decode(prompt_ids[1:] + response_ids[:-1]) == "once upon a time"


def test_plain_messages():
    tokenizer = byte_tokenizer()
    template = load_template("auto", tokenizer)
    text = "System: Be brief.\n\nUser: Who barks?\n\nAssistant: A dog.\n\nUser: And who purrs?\n\nAssistant:"
    assert template.text_of(tokenizer, TURNS) == text
    prompt_ids, response_ids = template.encode_pair(tokenizer, TURNS, "A cat.")
    assert tokenizer.decode(prompt_ids) == "<|bos|>" + text
    assert tokenizer.decode(response_ids) == " A cat.<|eos|>"
    assert (prompt_ids, response_ids) == template.encode_pair(
        tokenizer, TURNS, [{"role": "assistant", "content": "A cat."}]
    )
    with pytest.raises(ValueError, match="one assistant message"):
        template.encode_pair(tokenizer, TURNS[:2], TURNS[2:])


def test_plain_bos_and_eos_where_there_are_any():
    tokenizer = byte_tokenizer()
    template = load_template("auto", tokenizer)
    assert template.encode_prompt(tokenizer, "<|bos|>a dog") == template.encode_prompt(tokenizer, "a dog")
    none = byte_tokenizer(bos_token=None, eos_token=None)
    prompt_ids, response_ids = load_template("auto", none).encode_pair(none, "a dog", "barked")
    assert none.decode(prompt_ids + response_ids) == "a dog barked"


# ---------------------------------------------------------------------------------------------- chat templates


@pytest.mark.parametrize("prompt", ["who barked?", TURNS])
def test_llama3_ids_are_those_of_the_whole_conversation(prompt):
    tokenizer = byte_tokenizer(LLAMA3)
    template = load_template("auto", tokenizer)
    prompt_ids, response_ids = template.encode_pair(tokenizer, prompt, "the dog")
    turns = TURNS if prompt == TURNS else [{"role": "user", "content": prompt}]
    full = [*turns, {"role": "assistant", "content": "the dog"}]
    assert prompt_ids + response_ids == tokenizer.apply_chat_template(full, return_dict=False)
    assert prompt_ids == tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert prompt_ids == template.encode_prompt(tokenizer, prompt)
    assert prompt_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(response_ids) == "the dog<|eot_id|>"
    assert template.text_of(tokenizer, prompt, "the dog").endswith("\n\nthe dog<|eot_id|>")


def test_whitespace_behind_the_end_of_turn_is_left_out():
    tokenizer = byte_tokenizer(CHATML)
    prompt_ids, response_ids = load_template("auto", tokenizer).encode_pair(tokenizer, "who?", "the dog\n")
    assert tokenizer.decode(prompt_ids) == "<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(response_ids) == "the dog\n<|im_end|>"


def test_template_without_end_of_turn_gets_eos():
    tokenizer = byte_tokenizer(BARE)
    prompt_ids, response_ids = load_template("auto", tokenizer).encode_pair(tokenizer, "who?", "the dog")
    assert tokenizer.decode(prompt_ids) == "user> who?\nassistant>"
    assert tokenizer.decode(response_ids) == " the dog\n<|eos|>"


def test_generation_prompt_that_the_conversation_lacks_is_warned_of():
    tokenizer = byte_tokenizer(THINKING)
    with pytest.warns(UserWarning, match="does not begin with the rendered generation prompt"):
        template = load_template("auto", tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompt_ids, response_ids = template.encode_pair(tokenizer, "who?", "the dog")
    assert prompt_ids == template.encode_prompt(tokenizer, "who?")
    assert tokenizer.decode(prompt_ids).endswith("</think>\n\n")
    assert tokenizer.decode(response_ids) == "the dog<|im_end|>"


def test_refusing_template():
    tokenizer = byte_tokenizer(REFUSING)
    template = load_template("auto", tokenizer)
    with pytest.raises(jinja2.TemplateError, match="no system turn"):
        template.encode_prompt(tokenizer, TURNS)


# ---------------------------------------------------------------------------------------------- load, store, compare


def test_load_template(tmp_path):
    tokenizer = byte_tokenizer(LLAMA3)
    assert load_template("auto", tokenizer).source == LLAMA3
    assert load_template("plain", tokenizer).source == "plain"
    (tmp_path / "chatml.jinja").write_text(CHATML)
    assert load_template(str(tmp_path / "chatml.jinja"), tokenizer).source == CHATML
    (tmp_path / "marked.jinja").write_text(CHATML, encoding="utf-8-sig")  # a byte-order mark, as some editors write
    assert load_template(str(tmp_path / "marked.jinja"), tokenizer) == load_template(
        str(tmp_path / "chatml.jinja"), tokenizer
    )

    with pytest.raises(ConfigError, match=r"chat_template: no file .*chatmll.jinja'; did you mean '.*chatml.jinja'"):
        load_template(str(tmp_path / "chatmll.jinja"), tokenizer)
    (tmp_path / "empty.jinja").write_text("\n")
    with pytest.raises(ConfigError, match=r"chat_template: .*empty.jinja' is empty"):
        load_template(str(tmp_path / "empty.jinja"), tokenizer)
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}")
    with pytest.raises(ConfigError, match=r"chat_template: .*broken.jinja' fails"):
        load_template(str(tmp_path / "broken.jinja"), tokenizer)


def test_hash_names_source_and_special_tokens(tmp_path):
    tokenizer = byte_tokenizer(LLAMA3)
    mine = load_template("auto", tokenizer).hash
    assert len(mine) == 64
    assert int(mine, 16)
    others = [
        load_template("plain", tokenizer),
        load_template("auto", byte_tokenizer(CHATML)),
        load_template("auto", byte_tokenizer(LLAMA3, bos_token="<|im_start|>")),
        load_template("auto", byte_tokenizer(LLAMA3, eos_token="<|eot_id|>")),
    ]
    assert len({mine, *(t.hash for t in others)}) == 5
    tokenizer.save_pretrained(tmp_path)
    assert load_template("auto", load_tokenizer(str(tmp_path))).hash == mine


def test_stored_template_is_checked(tmp_path):
    tokenizer = byte_tokenizer(LLAMA3)
    mine, other = load_template("auto", tokenizer), load_template("plain", tokenizer)
    check_template(tmp_path, mine, "policy")
    check_template("owner/name-on-the-hub", mine, "policy")
    save_template(tmp_path, mine)
    assert [p.name for p in tmp_path.iterdir()] == [TEMPLATE_FILE]
    check_template(tmp_path, mine, "policy")
    with pytest.raises(ConfigError) as error:
        check_template(tmp_path, other, "dpo_model")
    assert str(error.value).startswith("dpo_model: ")
    assert mine.hash in str(error.value)
    assert other.hash in str(error.value)
    save_template(tmp_path, other)
    check_template(tmp_path, other, "policy")
    for text in ("{", "[]", json.dumps({"kind": "plain"})):
        (tmp_path / TEMPLATE_FILE).write_text(text)
        with pytest.raises(ConfigError, match=r"policy: .* is not a template record"):
            check_template(tmp_path, mine, "policy")


# ---------------------------------------------------------------------------------------------- date, bounds, terminal

DATED = "{{ 'Today ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML


def test_a_templates_date_is_the_runs(tmp_path):
    """Not the day's, so that stages, resumed runs and cached rows agree; a template without one knows none."""
    tokenizer = byte_tokenizer(DATED)
    template = load_template("auto", tokenizer, "2024-07-26")
    assert template.text_of(tokenizer, "Who?").startswith("Today 26 Jul 2024\n<|im_start|>user")
    later = load_template("auto", tokenizer, "2025-01-02")
    assert later.text_of(tokenizer, "Who?").startswith("Today 02 Jan 2025\n")
    assert (later.hash, later.day) != (template.hash, template.day)
    assert load_template("auto", tokenizer) == load_template("auto", tokenizer, RunConfig().template_date)
    for plain in (byte_tokenizer(CHATML), byte_tokenizer()):
        assert load_template("auto", plain, "2024-07-26") == load_template("auto", plain, "2025-01-02")
    save_template(tmp_path, template)
    check_template(tmp_path, template, "policy")
    with pytest.raises(ConfigError, match=r"policy: .* with the date 2024-07-26 .*--template-date 2024-07-26"):
        check_template(tmp_path, later, "policy")
    for date in ("yesterday", "2024-13-01", ""):
        with pytest.raises(ConfigError, match=r"template_date: '.*' is no date"):
            load_template("auto", tokenizer, date)


ENDLESS = {
    "time": "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{% set x = 'a' * (20000000000 * messages | length) %}{{ x }}",
    "size": "{{ 'a' * (20000000 * messages | length) }}",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_has_bounds(kind, monkeypatch):
    """On the first conversation, and on one that alone makes it large."""
    monkeypatch.setattr(bounds, "SECONDS", 0.5)
    with pytest.raises(ConfigError, match=r"template 'auto' fails.*(seconds|GiB|characters)"):
        load_template("auto", byte_tokenizer(ENDLESS[kind] + CHATML))
    only = "{% if messages[0].content == 'bomb' %}" + ENDLESS[kind] + "{% endif %}" + CHATML
    tokenizer = byte_tokenizer(only)
    template = load_template("auto", tokenizer)
    with pytest.raises(jinja2.TemplateError, match=r"seconds|GiB|characters"):
        template.encode_prompt(tokenizer, "bomb")
    assert template.encode_prompt(tokenizer, "Who?")


def test_bounds_leave_nothing_behind():
    before = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(jinja2.TemplateError), bounds.bounded():
        raise MemoryError
    with bounds.bounded():
        pass
    assert (signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    with ThreadPoolExecutor(1) as pool:  # signals reach the main thread alone: no bound on time there
        assert pool.submit(lambda: bounds.bounded().__enter__()).result() is None


def test_a_templates_message_is_plain_text():
    """Colours, line breaks and turned writing of a template's own message do not reach the terminal."""
    shout = "{{ raise_exception('\x1b[31mred\nerror: fine\u202edlo' + 'x' * 9000) }}"
    with pytest.raises(ConfigError) as error:
        load_template("auto", byte_tokenizer(shout))
    assert r"\x1b[31mred\nerror: fine\u202edlo" in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


def test_several_templates():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": BARE}
    assert load_template("auto", tokenizer).source == CHATML
    tokenizer.chat_template = {"rag": CHATML, "tool_use": BARE}
    with pytest.raises(ConfigError, match=r"chat_template: .*rag, tool_use.*none of them is the default.*Jinja file"):
        load_template("auto", tokenizer)


# ---------------------------------------------------------------------------------------------- tokenizer and model


@pytest.mark.parametrize(
    ("in_config", "expected"), [([5, 2, 5], (5, 2, 1)), (4, (4, 1)), (1, (1,)), (None, (1,)), ("no file", (1,))]
)
def test_stop_token_ids(tmp_path, in_config, expected):
    """Those of the generation_config, and the EOS (1) that the plain template ends a response in."""
    tokenizer = byte_tokenizer()
    if in_config != "no file":
        GenerationConfig(eos_token_id=in_config).save_pretrained(tmp_path)
    assert stop_token_ids(str(tmp_path), tokenizer, load_template("plain", tokenizer)) == expected


def test_the_templates_end_of_turn_stops(tmp_path):
    """A base model's generation_config does not name it; an end in ordinary text stops nothing."""
    tokenizer = byte_tokenizer(CHATML)
    GenerationConfig(eos_token_id=5).save_pretrained(tmp_path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(str(tmp_path), tokenizer, load_template("auto", tokenizer)) == (5, end)
    tokenizer = byte_tokenizer(BARE, eos_token=None)
    assert stop_token_ids(str(tmp_path), tokenizer, load_template("auto", tokenizer)) == (5,)


def test_no_stop_token(tmp_path):
    tokenizer = byte_tokenizer(eos_token=None)
    with pytest.raises(ConfigError, match="neither generation_config"):
        stop_token_ids(str(tmp_path), tokenizer, load_template("plain", tokenizer))


def test_load_tokenizer_names_the_argument(tmp_path):
    with pytest.raises(ConfigError, match=r"policy: no tokenizer in '.*nowhere'"):
        load_tokenizer(str(tmp_path / "nowhere"), "policy")


def test_check_vocabulary():
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    check_vocabulary(tokenizer, LlamaConfig(vocab_size=size), "model")
    check_vocabulary(tokenizer, LlamaConfig(vocab_size=size + 64), "model")
    with pytest.raises(ConfigError, match=f"model: the tokenizer has ids up to {size - 1}, the model has {size - 1}"):
        check_vocabulary(tokenizer, LlamaConfig(vocab_size=size - 1), "model")


def test_check_max_length():
    config = LlamaConfig(max_position_embeddings=512)
    check_max_length(512, config, "max_length")
    with pytest.raises(ConfigError, match="max_length: 513 tokens exceed the model's 512"):
        check_max_length(513, config, "max_length")
