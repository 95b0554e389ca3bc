"""Token rewards from a Python function or a server that the user wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rto_fast import distributed
from rto_fast.contract import ResponseTexts, Rollout
from rto_fast.data.columns import DataColumns
from rto_fast.data.tokenizer import token_texts
from rto_fast.errors import ConfigError, RewardError
from rto_fast.scoring.reward_function import given, load_function, wanted_by
from rto_fast.scoring.reward_server import RewardServer, number
from rto_fast.scoring.reward_source import TRIAL


@dataclass(frozen=True)
class TokenTexts:
    """What is known of B responses; one entry each."""

    prompts: list[str]
    """Prompt as rendered for the policy (chat template included)."""
    responses: list[str]
    """Response decoded without special tokens."""
    messages: list[list[dict]]
    """The prompt's messages."""
    token_ids: list[list[int]]
    """The response's tokens."""
    token_texts: list[list[str]]
    """Text of each token; special tokens have their names."""
    offsets: list[list[tuple[int, int]]]
    """Where in the response's text each token's characters stand, [start, end); special tokens have none."""
    columns: dict[str, list[Any]]
    """Columns of the prompts' rows."""

    @staticmethod
    def of(texts: ResponseTexts, token_ids: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> TokenTexts:
        """token_ids: of each response."""
        pairs = zip(token_ids, texts.responses, strict=True)
        return TokenTexts(
            prompts=texts.prompts, responses=texts.responses, messages=texts.messages, token_ids=token_ids,
            token_texts=[token_texts(tokenizer, ids) for ids in token_ids],
            offsets=[offsets_of(tokenizer, ids, text) for ids, text in pairs], columns=texts.columns,
        )  # fmt: skip


OFFERED = tuple(f.name for f in fields(TokenTexts) if f.name != "columns")
"""What a function gets by these names; a column of the data that shares one is hidden."""


def offsets_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[tuple[int, int]]:
    """[start, end) in `text` of each token's characters, where `text` is `ids` decoded without special tokens.

    A character that several tokens make up belongs to the last of them, and so does an unfinished one at the end.
    """
    special, kept, spans, end = set(tokenizer.all_special_ids), [], [], 0
    first = read = 0  # the last two words that were whole: decoders look at neighbours
    for i in ids:
        start = end
        if i not in special:
            kept.append(i)
            before, now = (str(tokenizer.decode(kept[a:b])) for a, b in ((first, read), (first, len(kept))))
            if not now.endswith("\ufffd"):
                end += len(now) - len(before)
                first, read = read, len(kept)
        spans.append((start, end))
    if kept and end < len(text):
        last = max(i for i, token in enumerate(ids) if token not in special)
        spans[last:] = [(spans[last][0], len(text)), *[(len(text), len(text))] * (len(ids) - last - 1)]
    return spans


def numbers(i: int, answer: Any, count: int) -> list[float]:
    """An answer for response i as `count` floats, NaN and infinity among them; ValueError where it is not so many."""
    if isinstance(answer, str | bytes | dict) or not hasattr(answer, "__len__"):
        raise ValueError(f"response {i} got a {type(answer).__name__}, not a list of {count} numbers")
    if len(answer) != count:
        raise ValueError(f"response {i} has {count} tokens and got {len(answer)} numbers")
    for value in answer:
        if isinstance(value, str | bytes):
            raise ValueError(f"response {i} got {value!r:.80}, which is not a number")
    try:
        return [float(value) for value in answer]
    except (TypeError, RuntimeError):
        raise ValueError(f"response {i} got something that is not a number: {answer!r:.200}") from None


class TokenFunction:
    """A Python function that gives B lists of numbers, one for each token of each response.

    It is called with those of `TokenTexts`' fields and the data's columns that its signature names. Rank 0 calls it
    once before the run, each rank once an iteration for its own responses.
    """

    setting = "token_reward"

    def __init__(self, name: str, fn: Callable[..., Any], wanted: Sequence[str], tokenizer: Any) -> None:
        self.name, self.fn, self.wanted, self.tokenizer = name, fn, wanted, tokenizer

    @classmethod
    def load(cls, spec: str, tokenizer: PreTrainedTokenizerBase, columns: DataColumns) -> TokenFunction:
        """From `module:function` or `path/to/file.py:function`. ConfigError where it asks for what nobody has."""
        fn = load_function(spec, cls.setting)
        return cls(spec, fn, wanted_by(fn, OFFERED, columns, f"{cls.setting}: fn:{spec}"), tokenizer)

    def score(self, rollout: Rollout, texts: ResponseTexts, reference: Tensor) -> Tensor:
        return self.score_texts(TokenTexts.of(texts, [r.tolist() for r in rollout.responses()], self.tokenizer))

    def score_texts(self, texts: TokenTexts) -> Tensor:
        """[R] fp32. Raises RewardError when the function raises, or answers otherwise than a number a token."""
        if not texts.responses:  # a rank without a share; users' functions need not know of it
            return torch.zeros(0)
        try:
            answer = self.fn(**given(texts, OFFERED, self.wanted))
        except (Exception, SystemExit) as error:  # an exit would end the run as if it were done
            raise RewardError(f"token reward {self.name} raised {type(error).__name__}: {error}") from error
        count = len(texts.responses)
        if isinstance(answer, str | bytes | dict) or not hasattr(answer, "__len__") or len(answer) != count:
            raise RewardError(f"token reward {self.name} must answer a list of {count} lists, one for each response")
        try:
            lists = [numbers(i, a, len(ids)) for i, (a, ids) in enumerate(zip(answer, texts.token_ids, strict=True))]
        except (ValueError, OverflowError) as error:
            raise RewardError(f"token reward {self.name}: {error}") from None
        return torch.tensor([x for one in lists for x in one], dtype=torch.float32)


class TokenServer(RewardServer):
    """A server of token rewards: POST {"prompts", "responses", "token_ids", "token_texts", "offsets"} and the data's
    "labels", lists of one entry a response -> {"rewards": [[number, ...], ...]}, one number a token."""

    setting = "token_reward"

    def __init__(self, url: str, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        """settings: RewardServer's."""
        super().__init__(url, **settings)
        self.tokenizer = tokenizer
        self.unit = "lists of numbers"

    def score(self, rollout: Rollout, texts: ResponseTexts, reference: Tensor) -> Tensor:
        return self.score_texts(TokenTexts.of(texts, [r.tolist() for r in rollout.responses()], self.tokenizer))

    def score_texts(self, texts: TokenTexts) -> Tensor:
        """[R] fp32; RewardError as `ask`."""
        if not texts.responses:
            return torch.zeros(0)
        columns = {name: getattr(texts, name) for name in OFFERED if name != "messages"} | self.labelled(texts.columns)

        def check(i: int, answer: Any) -> list[float]:
            if not isinstance(answer, list):
                raise ValueError("rewards is no list of lists, one for each response")
            return numbers(i, [number(a) for a in answer], len(texts.token_ids[i]))

        lists = self.ask(columns, check)
        return torch.tensor([x for one in lists for x in one], dtype=torch.float32)


def try_written(sources: Sequence[TokenFunction | TokenServer], texts: ResponseTexts) -> None:
    """Has rank 0 ask each for the rewards of made-up responses; collective.

    Raises ConfigError, before any model is loaded, where one fails or answers otherwise than with a number a token.
    """
    failure = ""
    for source in sources if distributed.rank() == 0 else ():
        decoded = source.tokenizer.batch_decode(texts.token_ids)
        try:
            source.score_texts(TokenTexts.of(replace(texts, responses=decoded), texts.token_ids, source.tokenizer))
        except RewardError as error:
            failure = failure or f"token_reward: tried on the response {TRIAL!r}: {error}"
    if failure := distributed.broadcast_object(failure):
        raise ConfigError(failure)
