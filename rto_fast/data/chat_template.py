"""How a prompt and a response become token ids, the same in every stage.

Two kinds of template:

- A Jinja chat template (the tokenizer's own, or a file). A string prompt is one user message. The response's
  ids are what the rendered conversation has after the rendered generation prompt, up to and including the
  end-of-turn token; whitespace that the template writes after it is left out, as no sampled response has it.
- The plain template, for tokenizers without one. A string prompt stands as it is, and the response follows
  after one space (none where the prompt ends or the response starts with whitespace). Messages are written as
  `User: ...`, blank line, `Assistant: ...`, and the generation prompt ends in `Assistant:`. The tokenizer's
  BOS comes first and its EOS after the response, where it has them.

Prompt and response are encoded so that the prompt's ids never depend on the response: what is trained on is
what the policy is asked to continue.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import warnings
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerBase

from rto_fast.config import TEMPLATE_DATE
from rto_fast.data.bounds import CHARACTERS, MESSAGE, bounded
from rto_fast.errors import ConfigError, require, shown

Message = dict[str, Any]
"""{"role": ..., "content": ...}, and what else of it a template may write (PLACED)."""
Prompt = str | list[Message]

PLAIN = "plain"
TEMPLATE_FILE = "rto_template.json"

PLACED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Fields of a message, beside its role and content, that are learnt: a template without a place for one is refused."""

_ANCHORS = ("\n", ".", "a", "0", ")")
"""Texts to put before a response when it is encoded alone; the first that does not merge with it is used."""


@dataclass(frozen=True)
class ChatTemplate:
    """How prompts and responses are written as text. Make one by `load_template`."""

    source: str
    """Jinja text, or "plain"."""
    hash: str
    """sha256 (hex) of the source, of the tokenizer's BOS and EOS, which templates write, and of the date where there is
    one."""
    day: str = ""
    """The day (YYYY-MM-DD) that the template writes for today's; empty where it asks for none."""

    def encode_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
        """Token ids that a response is sampled after; raises jinja2.TemplateError as the template does."""
        return self._with_bos(tokenizer, _encode(tokenizer, self.text_of(tokenizer, prompt)))

    def encode_pair(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str | list[Message]
    ) -> tuple[list[int], list[int]]:
        """(prompt ids, response ids); the first equal `encode_prompt`, the second end in end-of-turn or EOS.

        `response` is the text, or a list of one assistant message. Raises jinja2.TemplateError where the
        template refuses the conversation or has no place for a field of PLACED, and ValueError for any other
        message list.
        """
        head = self.text_of(tokenizer, prompt)
        tail = self._tail(tokenizer, prompt, head, _response_turn(response))
        eos = tokenizer.eos_token_id
        head_ids = _encode(tokenizer, head)
        tail_ids = _continue(tokenizer, head, head_ids, tail)
        if eos is not None and not (self.source != PLAIN and _ends_turn(tokenizer, tail)):
            tail_ids = [*tail_ids, eos]
        return self._with_bos(tokenizer, head_ids), tail_ids

    def text_of(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str | list[Message] | None = None
    ) -> str:
        """The prompt as rendered (with the generation prompt), and behind it the response where one is given.

        This is what reward functions and remote reward models see. A chat template's special tokens are in
        it; the plain template's BOS and EOS are not.
        """
        if self.source == PLAIN:
            head = prompt if isinstance(prompt, str) else self._plain_turns(prompt)
        else:
            head = self._render(tokenizer, as_messages(prompt), add_generation_prompt=True)
        if response is None:
            return head
        return head + self._tail(tokenizer, prompt, head, _response_turn(response))

    def _tail(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, head: str, turn: Message) -> str:
        """The text that follows `head`, end-of-turn included."""
        response: str = turn["content"]
        if self.source == PLAIN:
            self._check_places([turn])
            joined = head[-1:].isspace() or response[:1].isspace()
            return response if joined else " " + response
        full = self._render(tokenizer, [*as_messages(prompt), turn], add_generation_prompt=False)
        if full.startswith(head):
            tail = full[len(head) :]
        elif not turn.keys().isdisjoint(PLACED):
            raise jinja2.TemplateError(
                "it does not begin the answer with the generation prompt: what is more than text cannot be told apart"
            )
        else:
            warnings.warn(
                "chat_template: a rendered conversation does not begin with the rendered generation prompt: "
                "responses are encoded on their own behind it. A template that agrees with itself is safer",
                stacklevel=4,
            )
            at = full.rfind(response.strip())
            tail = full[at:] if at >= 0 else response
        return _to_first_end(tokenizer, tail)

    def _plain_turns(self, messages: list[Message]) -> str:
        self._check_places(messages)
        turns = [f"{m['role'].capitalize()}: {m['content']}" for m in messages]
        return "\n\n".join([*turns, "Assistant:"])

    def _check_places(self, turns: list[Message]) -> None:
        """Raises jinja2.TemplateError for a field that the template never mentions: it would be dropped."""
        for field in PLACED:
            if any(field in turn for turn in turns) and not re.search(rf"\b{field}\b", self.source):
                raise jinja2.TemplateError(f"a message has {field!r}, which has no place in it")

    def _render(self, tokenizer: PreTrainedTokenizerBase, turns: list[Message], add_generation_prompt: bool) -> str:
        """Raises jinja2.TemplateError as the template does, in printable text, and where it takes too much."""
        self._check_places(turns)
        settings: dict[str, Any] = {"chat_template": self.source, "add_generation_prompt": add_generation_prompt}
        if self.day:
            settings["strftime_now"] = date.fromisoformat(self.day).strftime
        try:
            with bounded():
                text = cast(str, tokenizer.apply_chat_template(turns, tokenize=False, **settings))
        except jinja2.TemplateError as e:
            raise jinja2.TemplateError(shown(e, MESSAGE)) from e
        if len(text) > CHARACTERS:
            raise jinja2.TemplateError(f"it writes {len(text):,} characters, more than {CHARACTERS:,}")
        return text

    def _with_bos(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
        """A chat template writes its own BOS; the plain one gets it here, once."""
        bos = tokenizer.bos_token_id
        return ids if self.source != PLAIN or bos is None or ids[:1] == [bos] else [bos, *ids]


def as_messages(prompt: Prompt) -> list[Message]:
    """A string prompt as one user message; messages as they are."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _response_turn(response: str | list[Message]) -> Message:
    if isinstance(response, str):
        return {"role": "assistant", "content": response}
    if len(response) != 1 or response[0]["role"] != "assistant":
        raise ValueError(f"response: expected one assistant message, got roles {[m['role'] for m in response]}")
    return response[0]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _continue(tokenizer: PreTrainedTokenizerBase, head: str, head_ids: list[int], tail: str) -> list[int]:
    """Ids of `tail` behind `head`: decoding head_ids + these gives head + tail back.

    Where a token would span the border, `tail` is encoded behind a text that leaves the border alone. It is
    not encoded bare, because some tokenizers put a space before every text.
    """
    ids = _encode(tokenizer, head + tail)
    if ids[: len(head_ids)] == head_ids:
        return ids[len(head_ids) :]
    for anchor in _ANCHORS:
        before, ids = _encode(tokenizer, anchor), _encode(tokenizer, anchor + tail)
        if ids[: len(before)] == before:
            return ids[len(before) :]
    return _encode(tokenizer, tail)


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return (special | {tokenizer.eos_token}) - {None, ""}


def _ends_turn(tokenizer: PreTrainedTokenizerBase, tail: str) -> bool:
    """Whether the text ends in a special token (whitespace aside)."""
    return tail.rstrip().endswith(tuple(_special_texts(tokenizer)))


def _to_first_end(tokenizer: PreTrainedTokenizerBase, tail: str) -> str:
    """`tail` without what the template writes behind the first token of its end, such as an end of text
    behind the end of turn.

    Sampling stops there, so that training and reward models must too.
    """
    special = "|".join(re.escape(t) for t in sorted(_special_texts(tokenizer), key=len, reverse=True))
    ends = re.search(rf"({special})(?:\s|{special})*$", tail) if special else None
    return tail[: ends.end(1)] if ends else tail


def load_template(
    config_chat_template: str, tokenizer: PreTrainedTokenizerBase, template_date: str = TEMPLATE_DATE
) -> ChatTemplate:
    """The template that the `chat_template` setting names: auto, plain, or the path of a Jinja file.

    template_date: YYYY-MM-DD, what a template writes that asks for today's date: one day for a run, and all its stages.
    Raises ConfigError for a missing file and for a template that fails on a conversation of two turns.
    """
    try:
        date.fromisoformat(template_date)
    except ValueError as e:
        raise ConfigError(f"template_date: {template_date!r} is no date; write it as YYYY-MM-DD") from e
    if config_chat_template == "auto":
        source = _own_template(tokenizer)
    elif config_chat_template == PLAIN:
        source = PLAIN
    else:
        path = Path(config_chat_template).expanduser()
        near = "" if path.exists() else near_names(path)
        require(path.is_file(), f"chat_template: no file {str(path)!r}{near}; give auto, plain or a Jinja file")
        try:
            source = path.read_text(encoding="utf-8-sig")  # an editor's byte-order mark is no part of it
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"chat_template: {str(path)!r} is no readable UTF-8 text: {e}") from e
        require(bool(source.strip()), f"chat_template: {str(path)!r} is empty")
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    day = template_date if re.search(r"\bstrftime_now\b", source) else ""
    text = json.dumps([source, special, *([day] if day else [])], sort_keys=True, ensure_ascii=True)
    template = ChatTemplate(source=source, hash=hashlib.sha256(text.encode()).hexdigest(), day=day)
    try:
        template.encode_pair(tokenizer, "Hello", "Hi there")
    except (jinja2.TemplateError, TypeError, ValueError) as e:
        raise ConfigError(
            f"chat_template: template {config_chat_template!r} fails on a user and an assistant turn: "
            f"{shown(e, MESSAGE)}; "
            "mend it, or use --chat-template plain"
        ) from e
    return template


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's template, of several the one named default; "plain" where it has none."""
    own = tokenizer.chat_template
    if isinstance(own, dict) and "default" not in own:
        raise ConfigError(
            f"chat_template: the tokenizer has the templates {shown(', '.join(own), MESSAGE)}, and none of them is the "
            "default; write one into a Jinja file and give its path, or use --chat-template plain"
        )
    return tokenizer.get_chat_template() if own else PLAIN


def near_names(path: Path) -> str:
    """ "; did you mean 'x'?" for files beside a missing one with a like name, else an empty string."""
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(str(path.parent / n)) for n in near)}?" if near else ""


def save_template(folder: str | Path, template: ChatTemplate) -> None:
    """Writes `rto_template.json` into a model folder, so that the next stage can refuse another template."""
    path = Path(folder) / TEMPLATE_FILE
    part = path.with_suffix(".part")
    kind = "plain" if template.source == PLAIN else "jinja"
    part.write_text(json.dumps({"hash": template.hash, "kind": kind, "date": template.day}) + "\n", encoding="utf-8")
    os.replace(part, path)


def check_template(folder: str | Path, template: ChatTemplate, argument: str) -> None:
    """Refuses (ConfigError) a model folder trained with another template; one without a record passes.

    `argument` is the setting that names the folder. A Hub id has no local record, so it passes.
    """
    path = Path(folder) / TEMPLATE_FILE
    if not path.is_file():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        stored, day = record["hash"], record.get("date", "")
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{argument}: {str(path)!r} is not a template record ({e}); export the model again") from e
    require(
        stored == template.hash or not day or day == template.day,
        f"{argument}: {str(folder)!r} was trained with the date {day} in its chat template, this run uses "
        f"{template.day or 'none'}; pass --template-date {day}",
    )
    require(
        stored == template.hash,
        f"{argument}: {str(folder)!r} was trained with chat template {stored}, this run uses {template.hash}"
        "; use the same --chat-template and tokenizer in every stage",
    )
