"""Rows as users have them -> (prompt, response), or why a row cannot be used.

Prompts are strings or message lists. Responses are strings, one assistant message, or the whole conversation
with the response as its last turn; then the earlier turns are the prompt, and a string in the prompt's column
(where `ultrafeedback_binarized` repeats the first turn) is not read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rto_fast.data.chat_template import ChatTemplate, Message, Prompt
from rto_fast.data.sources import Table

PROMPT_KEYS = ("context_messages", "prompt", "instruction")
RESPONSE_KEYS = ("response", "completion", "messages", "chosen")

MISSING = "missing key"
NOT_TEXT = "not text"
EMPTY = "empty text"
SAME = "chosen = rejected"
PROMPTS_DIFFER = "prompts differ"
NO_USER_TURN = "no turn to answer"
NO_ASSISTANT_TURN = "no assistant turn"
REFUSED = "refused by the template"
NO_LABEL = "no label"


class BadRow(Exception):
    """A row that cannot be used."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def encoded(
    prompt_ids: list[int],
    first_ids: Sequence[int] = (),
    second_ids: Sequence[int] = (),
    text: str = "",
    prompt: str = "",
) -> dict[str, Any]:
    """The fields every kind of row has once it is tokenised; those a kind does not use stay empty."""
    if not prompt_ids:
        raise BadRow(EMPTY, "the prompt has no tokens and the tokenizer no BOS")
    ids = {"prompt_ids": prompt_ids, "first_ids": list(first_ids), "second_ids": list(second_ids)}
    return ids | {"text": text, "prompt": prompt}


def prompt_row(
    row: dict[str, Any], keys: list[str], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> dict[str, Any]:
    """Prompt ids, the prompt as rendered, and as it stands in the data (JSON). keys: prompt, chosen or ""."""
    key, chosen_key = keys
    chosen = row.get(chosen_key)
    if isinstance(chosen, list) and len(chosen) > 1 and not isinstance(row.get(key), list):
        prompt = _prompt(_messages(chosen, chosen_key)[:-1], chosen_key)
    else:
        prompt = _prompt(row.get(key), key)
    text = template.text_of(tokenizer, prompt)
    return encoded(template.encode_prompt(tokenizer, prompt), text=text, prompt=json.dumps(prompt))


def preference_row(
    row: dict[str, Any], keys: list[str], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> dict[str, Any]:
    """Ids of prompt, chosen and rejected. keys: prompt, chosen, rejected."""
    prompt_key, chosen_key, rejected_key = keys
    prompt, chosen = _pair(row, prompt_key, chosen_key)
    other_prompt, rejected = _pair(row, prompt_key, rejected_key)
    if prompt != other_prompt:
        raise BadRow(PROMPTS_DIFFER, f"{chosen_key!r} and {rejected_key!r} do not share their earlier turns")
    prompt_ids, chosen_ids = template.encode_pair(tokenizer, prompt, chosen)
    _, rejected_ids = template.encode_pair(tokenizer, prompt, rejected)
    if chosen == rejected or chosen_ids == rejected_ids:
        raise BadRow(SAME, f"{chosen_key!r} and {rejected_key!r} are the same")
    return encoded(prompt_ids, chosen_ids, rejected_ids)


def answer_row(
    row: dict[str, Any], keys: list[str], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> dict[str, Any]:
    """Ids of prompt, desirable and undesirable answer: both of a pair, one of a labelled row (the other is empty).

    keys: prompt, chosen, rejected, completion, label; the last two are "" where the data are pairs.
    """
    prompt_key, chosen_key, rejected_key, completion_key, label_key = keys
    if not label_key:
        return preference_row(row, [prompt_key, chosen_key, rejected_key], tokenizer, template)
    label = row.get(label_key)
    if label is None or label not in (0, 1):
        raise BadRow(NO_LABEL, f"{label_key!r} is {label!r} where true or false was expected")
    prompt_ids, answer = template.encode_pair(tokenizer, *_pair(row, prompt_key, completion_key))
    return encoded(prompt_ids, answer, []) if label else encoded(prompt_ids, [], answer)


def sft_row(
    row: dict[str, Any], keys: list[str], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> dict[str, Any]:
    """Ids of prompt and response. keys: prompt, response."""
    return encoded(*template.encode_pair(tokenizer, *_pair(row, *keys)))


def prompt_columns(table: Table, prompt: str) -> list[str]:
    """Keys for `prompt_row`; raises DataError for a missing column, like the two below."""
    if prompt != "auto":
        return [table.need(prompt, flag="prompt-key"), ""]
    if not any(k in table.columns for k in PROMPT_KEYS) and isinstance(table.first().get("chosen"), list):
        return ["prompt", "chosen"]
    return [table.need(*PROMPT_KEYS, flag="prompt-key"), "chosen"]


def preference_columns(table: Table, prompt: str, chosen: str, rejected: str) -> list[str]:
    """Keys for `preference_row`."""
    table.need(chosen, flag="chosen-key")
    table.need(rejected, flag="rejected-key")
    _need_prompt(table, prompt, chosen)
    return [prompt, chosen, rejected]


def answer_columns(table: Table, prompt: str, chosen: str, rejected: str, completion: str, label: str) -> list[str]:
    """Keys for `answer_row`: labelled rows where the table has such columns, else pairs."""
    if completion in table.columns and label in table.columns:
        _need_prompt(table, prompt, completion)
        return [prompt, chosen, rejected, completion, label]
    return [*preference_columns(table, prompt, chosen, rejected), "", ""]


def sft_columns(table: Table, prompt: str, response: str) -> list[str]:
    """Keys for `sft_row`."""
    response = table.need(*(RESPONSE_KEYS if response == "auto" else (response,)), flag="response-key")
    _need_prompt(table, prompt, response)
    return [prompt, response]


def _need_prompt(table: Table, prompt: str, response: str) -> None:
    """Only whole conversations can do without a prompt column."""
    value = table.first().get(response)
    if not (isinstance(value, list) and len(value) > 1):
        table.need(prompt, flag="prompt-key")


def _text(value: Any, key: str) -> str:
    if value is None:
        raise BadRow(MISSING, f"{key!r} is missing")
    if not isinstance(value, str):
        raise BadRow(NOT_TEXT, f"{key!r} is {type(value).__name__} where text was expected: {str(value)[:60]!r}")
    if not value.strip():
        raise BadRow(EMPTY, f"{key!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as e:  # half of a surrogate pair, which JSON can spell and no tokenizer reads
        raise BadRow(NOT_TEXT, f"{key!r} holds {value[e.start]!a} at character {e.start}, half a character") from e
    return value


def _messages(value: list, key: str) -> list[Message]:
    """Role and content of each message; a system message may be empty."""
    if not value:
        raise BadRow(EMPTY, f"{key!r} is an empty list")
    out: list[Message] = []
    for n, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadRow(NOT_TEXT, f"'{key}[{n}]' is {type(message).__name__} where a message was expected")
        role = _text(message.get("role"), f"{key}[{n}].role")
        content: Any = message.get("content")
        if not (role == "system" and content == ""):
            _text(content, f"{key}[{n}].content")
        out.append({"role": role, "content": content})
    return out


def _prompt(value: Any, key: str) -> Prompt:
    if not isinstance(value, list):
        return _text(value, key)
    messages = _messages(value, key)
    if messages[-1]["role"] == "assistant":
        raise BadRow(NO_USER_TURN, f"the prompt in {key!r} ends in an assistant turn where a user's was expected")
    return messages


def _pair(row: dict[str, Any], prompt_key: str, response_key: str) -> tuple[Prompt, str]:
    """(prompt, response) of every format."""
    response = row.get(response_key)
    if not isinstance(response, list):
        response = _text(response, response_key)
        return _prompt(row.get(prompt_key), prompt_key), response
    messages = _messages(response, response_key)
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise BadRow(NO_ASSISTANT_TURN, f"{response_key!r} ends in a turn of {role!r}, not the assistant's")
    text = messages[-1]["content"]
    if len(messages) == 1:
        return _prompt(row.get(prompt_key), prompt_key), text
    prompt = _prompt(messages[:-1], response_key)
    stated = row.get(prompt_key)
    if isinstance(stated, list) and _prompt(stated, prompt_key) != prompt:
        raise BadRow(PROMPTS_DIFFER, f"the earlier turns of {response_key!r} are not those of {prompt_key!r}")
    return prompt, text
