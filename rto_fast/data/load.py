"""Prompts, preference pairs and SFT rows -> token ids.

`load_prompts`, `load_preferences` and `load_sft` read a Hub data set, a local .jsonl/.json/.parquet/.csv
file or a folder saved by `datasets.save_to_disk` (sources.py), bring every known row format to prompt and
response (row_formats.py) and encode them with the run's template (chat_template.py). A row's number is its 0-based
index in the data set; messages about JSON lines and CSV files name the 1-based line instead.

Length limits apply after the cache of tokenised rows (tokenise.py): a new limit tokenises nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from rto_fast.config import DPOConfig, PreferenceConfig, RMConfig, RTOConfig, RunConfig, SFTConfig, SupervisedConfig
from rto_fast.data.chat_template import (
    ChatTemplate,
    Message,
    Prompt,
    as_messages,
)
from rto_fast.data.row_formats import (
    EMPTY,
    SAME,
    answer_columns,
    answer_row,
    preference_columns,
    preference_row,
    prompt_columns,
    prompt_row,
    sft_columns,
    sft_row,
)
from rto_fast.data.sources import has_splits
from rto_fast.data.tokenise import Columns, Encode, TokenLists, TokenRows, load_rows, place_of
from rto_fast.errors import DataError

TOO_LONG = "longer than the limit"
PROMPT_TOO_LONG = "prompt alone longer than the limit"
SAME_CUT = "chosen = rejected once cut"


@dataclass(frozen=True)
class Counts:
    """What became of the rows of one data set (before a held-out share is split off)."""

    total: int
    kept: int
    skipped: dict[str, int]
    """Rows left out, by reason."""
    truncated: int = 0
    """Kept rows whose response was cut to the length limit."""

    def __str__(self) -> str:
        text = f"{self.total:,} rows, {self.kept:,} kept"
        if self.truncated:
            text += f" ({self.truncated:,} of them cut to the limit)"
        if self.skipped:
            reasons = ", ".join(f"{reason}: {n:,}" for reason, n in self.skipped.items())
            text += f", {self.total - self.kept:,} skipped ({reasons})"
        return text


@dataclass(frozen=True)
class PromptData:
    """Prompts to sample from."""

    prompt_ids: Sequence[list[int]]
    texts: list[str]
    """The prompts as rendered: what reward functions and remote reward models see."""
    messages: list[list[Message]]
    """The prompts as messages (a string prompt is one user message)."""
    rows: list[int]
    """0-based rows of the data set."""
    counts: Counts
    prompts: list[Prompt]
    """The prompts as the data has them (string or messages), for encoding with another model's template."""
    name: str
    """The data set as the user gave it."""
    lines: list[int]
    """1-based lines of the file; 0 where it has none."""

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, index: int) -> str:
        """Where a prompt stands in the data."""
        return place_of("data", self.name, self.rows[index], self.lines[index])


@dataclass(frozen=True)
class PreferenceData:
    """Pairs of responses to one prompt."""

    prompt_ids: Sequence[list[int]]
    chosen_ids: Sequence[list[int]]
    """Response ids with the end of turn, unless cut."""
    rejected_ids: Sequence[list[int]]
    rows: list[int]
    """0-based rows of the data set."""
    counts: Counts
    margins: np.ndarray
    """[rows] float64: by how much the data say that chosen should win; 0 where it is not read."""

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class SFTData:
    """Prompts with the response to learn."""

    prompt_ids: Sequence[list[int]]
    response_ids: Sequence[list[int]]
    """Response ids with the end of turn, unless cut."""
    rows: list[int]
    """0-based rows of the data set."""
    counts: Counts

    def __len__(self) -> int:
        return len(self.rows)


def load_prompts(config: RTOConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> PromptData:
    """Prompts of `config.data`, at most `config.max_prompt_length` tokens each.

    With prompt_key "auto" a string prompt beside a `chosen` conversation is read from that conversation, as
    `load_preferences` does, so that all stages see one prompt. A prompt is never cut: over the limit it is
    skipped under overlong "truncate" too. Prints the counts; raises DataError.
    """
    encode = partial(prompt_row, tokenizer=tokenizer, template=template)
    columns = partial(prompt_columns, prompt=config.prompt_key)
    rows = load_rows(config, "data", config.data, encode, columns)
    kept, counts, _ = _judge(config, rows, config.max_prompt_length, "max_prompt_length")
    prompts = [json.loads(rows.prompts[i]) for i in kept]
    return PromptData(
        prompt_ids=rows.prompt_ids.take(kept),
        texts=[rows.texts[i] for i in kept],
        messages=[as_messages(p) for p in prompts],
        rows=kept.tolist(),
        counts=counts,
        prompts=prompts,
        name=config.data,
        lines=[rows.lines[i] for i in kept],
    )


def load_preferences(
    config: PreferenceConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> tuple[PreferenceData, PreferenceData]:
    """(training pairs, held-out pairs), at most `config.max_length` tokens of prompt + longer response.

    Where chosen and rejected are whole conversations, their earlier turns are the prompt and must be the same
    in both. Held out are the rows of `config.eval_data` (or of `config.eval_split`, where `data` has splits), else a
    share `config.eval_fraction` chosen by the seed, whole prompts at a time, so that no held-out prompt is trained on.
    The reward model's margins are read where it has a weight for them. Prints the counts. Raises DataError.
    """
    encode = partial(preference_row, tokenizer=tokenizer, template=template)
    columns = partial(
        preference_columns, prompt=config.prompt_key, chosen=config.chosen_key, rejected=config.rejected_key,
        margin=isinstance(config, RMConfig) and config.margin_weight > 0,
    )  # fmt: skip
    train, held_out = _train_and_held_out(config, encode, columns)
    return train.pairs(), held_out.pairs()


def load_answers(
    config: DPOConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> tuple[PreferenceData, PreferenceData]:
    """As `load_preferences`, from pairs or from labelled rows {prompt, completion, label}.

    A labelled row is a pair whose other response is empty: `rejected_ids` where it is desirable, else `chosen_ids`.
    """
    encode = partial(answer_row, tokenizer=tokenizer, template=template)
    columns = partial(
        answer_columns, prompt=config.prompt_key, chosen=config.chosen_key, rejected=config.rejected_key,
        completion=config.completion_key, label=config.label_key,
    )  # fmt: skip
    train, held_out = _train_and_held_out(config, encode, columns)
    return train.pairs(), held_out.pairs()


def load_sft(config: SFTConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> tuple[SFTData, SFTData]:
    """(training rows, held-out rows), at most `config.max_length` tokens of prompt + response.

    Of a `messages` list the last turn, the assistant's, is the response and all earlier ones are the prompt.
    Held out as in `load_preferences`. Prints the counts; raises DataError.
    """
    encode = partial(sft_row, tokenizer=tokenizer, template=template)
    columns = partial(sft_columns, prompt=config.prompt_key, response=config.response_key)
    train, held_out = _train_and_held_out(config, encode, columns)
    return train.responses(), held_out.responses()


def load_ptx(config: RTOConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> SFTData:
    """Rows of `config.ptx_data` as `load_sft` reads them, no longer than a prompt and a response of the run.

    Prints the counts; raises DataError.
    """
    encode = partial(sft_row, tokenizer=tokenizer, template=template)
    columns = partial(sft_columns, prompt=config.ptx_prompt_key, response=config.ptx_response_key)
    limit = config.max_prompt_length + config.max_response_length
    rows = load_rows(config, "ptx_data", config.ptx_data, encode, columns)
    return _part(config, rows, limit, "max_prompt_length + max_response_length").responses()


@dataclass(frozen=True)
class _Part:
    prompt_ids: TokenLists
    first_ids: TokenLists
    second_ids: TokenLists
    rows: list[int]
    counts: Counts
    margins: np.ndarray

    def take(self, index: np.ndarray) -> _Part:
        return _Part(
            self.prompt_ids.take(index), self.first_ids.take(index), self.second_ids.take(index),
            [self.rows[i] for i in index], self.counts, self.margins[index],
        )  # fmt: skip

    def pairs(self) -> PreferenceData:
        return PreferenceData(self.prompt_ids, self.first_ids, self.second_ids, self.rows, self.counts, self.margins)

    def responses(self) -> SFTData:
        return SFTData(self.prompt_ids, self.first_ids, self.rows, self.counts)


def _train_and_held_out(config: SupervisedConfig, encode: Encode, columns: Columns) -> tuple[_Part, _Part]:
    def part(argument: str, name: str) -> _Part:
        rows = load_rows(config, argument, name, encode, columns)
        return _part(config, rows, config.max_length, "max_length")

    train = part("data", config.data)
    if config.eval_data or (config.eval_split and has_splits(config.data)):
        return train, part("eval_data", config.eval_data or config.data)
    held_out = _held_out(train.prompt_ids, config.eval_fraction, config.seed)
    return train.take(np.flatnonzero(~held_out)), train.take(np.flatnonzero(held_out))


def _part(config: RunConfig, rows: TokenRows, limit: int, limit_name: str) -> _Part:
    """The rows within the limit, in tokens of prompt + longer response."""
    kept, counts, limits = _judge(config, rows, limit, limit_name)
    first, second = (ids.take(kept).cut(limits) for ids in (rows.first_ids, rows.second_ids))
    return _Part(rows.prompt_ids.take(kept), first, second, kept.tolist(), counts, rows.margins[kept])


def _held_out(prompts: TokenLists, fraction: float, seed: int) -> np.ndarray:
    """[rows] bool: about `fraction` of the rows, all rows of a prompt together, in order of seeded hashes.

    At least one row when fraction > 0 and there are two; rows go singly where every prompt has too many.
    """
    n = len(prompts)
    wanted = min(n - 1, max(1, round(fraction * n))) if fraction > 0 else 0
    order: dict[bytes, list[int]] = {}
    for row, ids in enumerate(prompts):
        order.setdefault(hashlib.sha256(f"{seed}:{ids}".encode()).digest(), []).append(row)
    groups = [order[k] for k in sorted(order)]
    if not any(len(g) <= wanted for g in groups):
        groups = [[row] for g in groups for row in g]
    held_out = np.zeros(n, dtype=bool)
    for group in groups:
        if len(group) <= wanted:
            held_out[group] = True
            wanted -= len(group)
    return held_out


def _judge(config: RunConfig, rows: TokenRows, limit: int, limit_name: str) -> tuple[np.ndarray, Counts, np.ndarray]:
    """(kept rows, counts, the kept rows' response limits in tokens).

    Raises DataError where a flag says refuse and where no row is left; prints the counts on rank 0.
    """
    reasons = rows.reasons.copy()
    skips = {"refuse": (), "skip_empty": (EMPTY, SAME), "skip": set(reasons)}[config.invalid_rows]
    bad = [i for i, reason in enumerate(reasons) if reason and reason not in skips]
    if bad:
        raise DataError(
            f"{rows.at(bad[0])}: {rows.details[bad[0]]} ({reasons[bad[0]]}; the first of {len(bad):,} "
            f"unusable rows in {len(reasons):,}); mend the data, or pass --invalid-rows skip"
        )
    prompt = rows.prompt_ids.lengths
    lengths = prompt + np.maximum(rows.first_ids.lengths, rows.second_ids.lengths)
    over = np.flatnonzero(lengths > limit).tolist()
    responses = bool(rows.first_ids.lengths.any() or rows.second_ids.lengths.any())
    if over and config.overlong == "refuse":
        longer = " or ".join(f"--{name.replace('_', '-')}" for name in limit_name.split(" + "))
        raise DataError(
            f"{rows.at(over[0])}: {lengths[over[0]]} tokens, over {limit_name} {limit} (the first of "
            f"{len(over):,} such rows in {len(reasons):,}, the longest has {lengths.max()}); raise "
            f"{longer}, or pass --overlong skip{' or truncate' if responses else ''}"
        )
    truncated = 0
    for i in over:
        room = limit - prompt[i]
        if config.overlong != "truncate" or not responses:
            reasons[i] = TOO_LONG
        elif room < 1:
            reasons[i] = PROMPT_TOO_LONG
        elif rows.first_ids[i][:room] == rows.second_ids[i][:room]:
            reasons[i] = SAME_CUT
        else:
            truncated += 1
    kept = np.array([i for i, reason in enumerate(reasons) if not reason], dtype=np.int64)
    skipped = dict(sorted(Counter(r for r in reasons if r).items()))
    counts = Counts(total=len(reasons), kept=len(kept), skipped=skipped, truncated=truncated)
    if not len(kept):
        raise DataError(f"{rows.argument}: no usable row in {rows.name!r}: {counts}; {limit_name} is {limit}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{rows.argument} {rows.name}: {counts}", flush=True)
    return kept, counts, limit - prompt[kept]
