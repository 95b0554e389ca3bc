"""Rows as users have them -> (prompt, response), or why a row cannot be used.

Prompts are strings or message lists. Responses are strings, one assistant message, or the whole conversation
with the response as its last turn; then the earlier turns are the prompt, and a string in the prompt's column
must be one of them (as in `ultrafeedback_binarized`, which repeats the first) or hold them all.

A prompt also has what other columns of the row add to it: `system` or `system_prompt` its first turn, and behind an
`instruction` its `input` (Alpaca) or `context` (Dolly). Message lists may be text where a file knows nothing else. What
would be learnt and cannot be read is refused: no column or field is dropped that belongs to the conversation.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rto_fast.data.chat_template import PLACED, ChatTemplate, Message, Prompt, as_messages
from rto_fast.data.sources import Table
from rto_fast.errors import DataError

PROMPT_KEYS = ("context_messages", "prompt", "instruction")
RESPONSE_KEYS = ("response", "completion", "messages", "chosen")
SYSTEM_KEYS = ("system", "system_prompt")
INSTRUCTION, INPUT_KEYS = "instruction", ("input", "context")
"""A column of prompts, and those whose text belongs behind its own."""
MARGIN_KEY, SCORE_KEYS = "margin", ("score_chosen", "score_rejected")
"""The column of a pair's margin, and those whose difference it is where there is no such column."""
UNREAD_COLUMNS = ("tools", "functions", "history", "documents", "images", "image", "videos", "audio")
"""Columns that belong to a conversation, and that no stage can read."""
REFERENCES = ("name", "tool_call_id")
"""Fields of a message that a template may write and need not."""
UNREAD_FIELDS = ("images", "image", "videos", "video", "audio", "documents")

MISSING = "missing key"
NOT_TEXT = "not text"
EMPTY = "empty text"
SAME = "chosen = rejected"
PROMPTS_DIFFER = "prompts differ"
NO_USER_TURN = "no turn to answer"
NO_ASSISTANT_TURN = "no assistant turn"
REFUSED = "refused by the template"
NO_LABEL = "no label"
NO_MARGIN = "no margin"
NOT_READ = "field not read"

_MESSAGE_LIST = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


class BadRow(Exception):
    """A row that cannot be used."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def row_of(raw: dict[str, Any], as_text: bool, literal: bool) -> dict[str, Any]:
    """A row of a Table. Where it is not literal, message lists that stand as text are read, and the empty fields that
    a column's type puts into every entry are left out.
    """
    row = json.loads(raw["json"]) if as_text else raw
    return row if literal else {k: _without_none(_message_list(v, k)) for k, v in row.items()}


def _given(value: Any) -> bool:
    """Whether a column that a row need not have holds something."""
    return bool(value.strip()) if isinstance(value, str) else value not in (None, [], {})


def _message_list(value: Any, key: str) -> Any:
    """A message list that stands as text; any other value as it is."""
    if not isinstance(value, str) or not _MESSAGE_LIST.match(value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as e:
        raise BadRow(NOT_TEXT, f"{key!r} is a message list that is no JSON ({e}); write it by json.dumps") from e


def _without_none(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return {k: _without_none(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def encoded(
    prompt_ids: list[int],
    first_ids: Sequence[int] = (),
    second_ids: Sequence[int] = (),
    text: str = "",
    prompt: str = "",
    margin: float = 0.0,
) -> dict[str, Any]:
    """The fields every kind of row has once it is tokenised; those a kind does not use stay empty."""
    if not prompt_ids:
        raise BadRow(EMPTY, "the prompt has no tokens and the tokenizer no BOS")
    ids = {"prompt_ids": prompt_ids, "first_ids": list(first_ids), "second_ids": list(second_ids)}
    return ids | {"text": text, "prompt": prompt, "margin": margin}


def prompt_row(
    row: dict[str, Any], keys: list[str], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> dict[str, Any]:
    """Prompt ids, the prompt as rendered, and as it stands in the data (JSON). keys: prompt, chosen or ""."""
    key, chosen_key = keys
    chosen = row.get(chosen_key)
    if isinstance(chosen, list) and len(chosen) > 1 and not isinstance(row.get(key), list):
        prompt = _earlier_turns(row, key, chosen_key, _messages(chosen, chosen_key))
    else:
        prompt = _stated_prompt(row, key, key)
    text = template.text_of(tokenizer, prompt)
    return encoded(template.encode_prompt(tokenizer, prompt), text=text, prompt=json.dumps(prompt))


def preference_row(
    row: dict[str, Any], keys: list[str], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> dict[str, Any]:
    """Ids of prompt, chosen and rejected, and their margin. keys: prompt, chosen, rejected, columns of the margin."""
    prompt_key, chosen_key, rejected_key, *margin_keys = keys
    prompt, chosen = _pair(row, prompt_key, chosen_key)
    other_prompt, rejected = _pair(row, prompt_key, rejected_key)
    if prompt != other_prompt:
        raise BadRow(PROMPTS_DIFFER, f"{chosen_key!r} and {rejected_key!r} do not share their earlier turns")
    prompt_ids, chosen_ids = template.encode_pair(tokenizer, prompt, chosen)
    _, rejected_ids = template.encode_pair(tokenizer, prompt, rejected)
    if chosen == rejected or chosen_ids == rejected_ids:
        raise BadRow(SAME, f"{chosen_key!r} and {rejected_key!r} are the same")
    return encoded(prompt_ids, chosen_ids, rejected_ids, margin=_margin(row, margin_keys))


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
    if isinstance(label, str):  # as all values of a CSV file are
        label = _LABELS.get(label.strip().lower(), label)
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
    if not any(k in table.columns for k in PROMPT_KEYS) and isinstance(_first(table, "chosen"), list):
        return ["prompt", "chosen"]
    return [table.need(*PROMPT_KEYS, flag="prompt-key"), "chosen"]


def preference_columns(table: Table, prompt: str, chosen: str, rejected: str, margin: bool = False) -> list[str]:
    """Keys for `preference_row`; margin: whether the data's margins are read."""
    table.need(chosen, flag="chosen-key")
    table.need(rejected, flag="rejected-key")
    _need_prompt(table, prompt, chosen)
    return [prompt, chosen, rejected, *(_margin_columns(table) if margin else ())]


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


def _margin_columns(table: Table) -> tuple[str, ...]:
    """The column of margins, else the two of scores."""
    if MARGIN_KEY in table.columns:
        return (MARGIN_KEY,)
    if not all(key in table.columns for key in SCORE_KEYS):
        raise DataError(
            f"{table.argument}: {table.name!r} has no column {MARGIN_KEY!r} and lacks one of "
            f"{' and '.join(map(repr, SCORE_KEYS))}, which margin_weight needs; it has "
            f"{', '.join(map(repr, table.columns))}; add one of the two, or use --margin-weight 0"
        )
    return SCORE_KEYS


def _need_prompt(table: Table, prompt: str, response: str) -> None:
    """Only whole conversations can do without a prompt column."""
    value = _first(table, response)
    if not (isinstance(value, list) and len(value) > 1):
        table.need(prompt, flag="prompt-key")


def _first(table: Table, column: str) -> Any:
    """The column's value in the first row; None where that row cannot be read, which is reported with its number."""
    try:
        return row_of(table.rows[0], table.as_text, table.literal).get(column)
    except BadRow:
        return None


def _margin(row: dict[str, Any], keys: Sequence[str]) -> float:
    """A pair's margin, or the difference of its two scores; 0 where no column is read."""
    if not keys:
        return 0.0
    numbers = [_number(row.get(key), key) for key in keys]
    margin = numbers[0] - sum(numbers[1:])
    if not math.isfinite(margin):
        raise BadRow(NO_MARGIN, f"{' - '.join(map(repr, keys))} is {margin} where a finite number was expected")
    return margin


def _number(value: Any, key: str) -> float:
    """A finite number, or its text, as a CSV file has it."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(NO_MARGIN, f"{key!r} is {str(value)[:60]!r} where a finite number was expected")
    return number


def _text(value: Any, key: str) -> str:
    if value is None:
        raise BadRow(MISSING, f"{key!r} is missing")
    if not isinstance(value, str):
        raise BadRow(NOT_TEXT, f"{key!r} is {type(value).__name__} where text was expected: {str(value)[:60]!r}")
    if not value.strip():
        raise BadRow(EMPTY, f"{key!r} is empty")
    return check_text(value, key)


def check_text(value: Any, key: str) -> Any:
    """The value; refuses text with half of a surrogate pair, which JSON can spell, and no tokenizer or file takes."""
    try:
        str(value).encode()
    except UnicodeEncodeError as e:
        raise BadRow(NOT_TEXT, f"{key!r} holds {e.object[e.start]!a} at character {e.start}, half a character") from e
    return value


def _messages(value: list, key: str) -> list[Message]:
    """Role and content of each message, and what else a template may write of it.

    A system message may be empty, and a message that calls tools.
    """
    if not value:
        raise BadRow(EMPTY, f"{key!r} is an empty list")
    out: list[Message] = []
    for n, message in enumerate(value):
        at = f"{key}[{n}]"
        if not isinstance(message, dict):
            raise BadRow(NOT_TEXT, f"{at!r} is {type(message).__name__} where a message was expected")
        role = _text(message.get("role"), f"{at}.role")
        more = {k: message[k] for k in (*PLACED, *REFERENCES) if message.get(k)}
        if "tool_calls" in more:
            more["tool_calls"] = _tool_calls(more["tool_calls"], f"{at}.tool_calls")
        content: Any = message.get("content")
        if content in (None, "") and ("tool_calls" in more or "function_call" in more):
            content = ""
        elif not (role == "system" and content == ""):
            _text(content, f"{at}.content")
        for field in UNREAD_FIELDS:
            if message.get(field):
                raise BadRow(NOT_READ, f"'{at}.{field}' has no place in a conversation of text; leave it out")
        out.append({"role": role, "content": content} | more)
    return out


def _tool_calls(value: Any, key: str) -> list[dict[str, Any]]:
    """The calls, with arguments as an object, as templates want them, where the data have them as JSON text."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise BadRow(NOT_TEXT, f"{key!r} is no list of objects: {str(value)[:60]!r}")
    out = []
    for call in value:
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"])
            except (ValueError, RecursionError) as e:
                raise BadRow(NOT_TEXT, f"{key!r} has arguments that are no JSON: {e}") from e
            function = function | {"arguments": arguments}
        out.append(call | {"function": function} if "function" in call else function)
    return out


def _prompt(value: Any, key: str) -> Prompt:
    if not isinstance(value, list):
        return _text(value, key)
    messages = _messages(value, key)
    if messages[-1]["role"] == "assistant":
        raise BadRow(NO_USER_TURN, f"the prompt in {key!r} ends in an assistant turn where a user's was expected")
    return messages


def _stated_prompt(row: dict[str, Any], key: str, *read: str) -> Prompt:
    """The prompt in column `key` with what other columns add to it. read: the columns that a stage reads."""
    prompt = _prompt(row.get(key), key)
    for extra in INPUT_KEYS:
        if key == INSTRUCTION and isinstance(prompt, str) and extra not in read and _given(row.get(extra)):
            prompt = f"{prompt}\n\n{_text(row[extra], extra)}"
    return _with_system(row, prompt, *read)


def _with_system(row: dict[str, Any], prompt: Prompt, *read: str) -> Prompt:
    """The prompt behind the system turn of a column, where there is one; columns nobody reads are refused."""
    for column in UNREAD_COLUMNS:
        if column not in read and _given(row.get(column)) and row[column] not in ("[]", "{}", "null"):
            raise BadRow(NOT_READ, f"column {column!r} belongs to the conversation and is not read; leave it out")
    for column in SYSTEM_KEYS:
        if column in read or not _given(row.get(column)):
            continue
        system = {"role": "system", "content": _text(row[column], column)}
        messages = as_messages(prompt)
        if messages[0]["role"] != "system":
            prompt = [system, *messages]
        elif messages[0] != system:
            raise BadRow(PROMPTS_DIFFER, f"{column!r} is not the system turn of the prompt")
    return prompt


def _earlier_turns(row: dict[str, Any], prompt_key: str, response_key: str, messages: list[Message]) -> Prompt:
    """The prompt of a whole conversation, which must be the stated one where there is one."""
    prompt = _with_system(row, _prompt(messages[:-1], response_key), prompt_key, response_key)
    stated = row.get(prompt_key)
    if isinstance(stated, list):
        if _stated_prompt(row, prompt_key, response_key) != prompt:
            raise BadRow(PROMPTS_DIFFER, f"the earlier turns of {response_key!r} are not those of {prompt_key!r}")
    elif isinstance(stated, str) and stated.strip():
        texts = [m["content"].strip() for m in messages[:-1]]
        if stated.strip() not in texts and not all(text in stated for text in texts):
            raise BadRow(PROMPTS_DIFFER, f"{prompt_key!r} is none of the earlier turns of {response_key!r}")
    return prompt


def _pair(row: dict[str, Any], prompt_key: str, response_key: str) -> tuple[Prompt, str | list[Message]]:
    """(prompt, response) of every format; a response that is more than its text is one message."""
    response = row.get(response_key)
    if not isinstance(response, list):
        response = _text(response, response_key)
        return _stated_prompt(row, prompt_key, prompt_key, response_key), response
    messages = _messages(response, response_key)
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise BadRow(NO_ASSISTANT_TURN, f"{response_key!r} ends in a turn of {role!r}, not the assistant's")
    answer = messages[-1] if not messages[-1].keys().isdisjoint(PLACED) else None
    text = [answer] if answer else messages[-1]["content"]
    if len(messages) == 1:
        return _stated_prompt(row, prompt_key, prompt_key, response_key), text
    return _earlier_turns(row, prompt_key, response_key, messages), text
