"""`rto-fast audit`: what token rewards lean on.

    rto-fast audit --run runs/rto                                           the responses that a run has kept
    rto-fast audit --run runs/rto --reward-model runs/rm/model              and how they agree with a reward model
    rto-fast audit --data four.jsonl --dpo-model runs/dpo/model --reference runs/sft/model --output audit.json

A file of responses has rows {prompt, response}; `rto-fast generate --token-logprobs True` writes such rows, whose
token_ids are then read as they are. Rows may bring a score; without it the reward model's is taken.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rto_fast.config import TEMPLATE_DATE, RTOConfig, expand_home
from rto_fast.contract import Request, ResponseTexts, Rollout
from rto_fast.data.chat_template import ChatTemplate, load_template
from rto_fast.data.row_formats import PROMPT_KEYS, BadRow, prompt_row, row_of
from rto_fast.data.sources import open_source
from rto_fast.data.tokenizer import check_max_length, load_tokenizer, token_texts
from rto_fast.errors import ConfigError, DataError, require
from rto_fast.logs.files import RUN, SAMPLES, write_atomic
from rto_fast.models.load import check_reward_head, check_weights, load_config, load_policy, load_scalar, place
from rto_fast.models.packing import Placement
from rto_fast.report.audit import Audit, Response, audit, bound_of, grids, of_samples
from rto_fast.report.samples import ReportSample, read_samples
from rto_fast.scoring.token_load import check_tokens
from rto_fast.scoring.token_source import LogRatio, Scalar, over_rollout

NO_TEXTS = ResponseTexts([], [], [])
"""Models read tokens."""


OF_DATA = (
    "beta1", "dpo_clip", "data_split", "max_rows", "response_key", "score_key", "chat_template", "template_date",
)  # fmt: skip
"""Settings that are read of --data alone."""


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """What token rewards lean on: kinds of tokens, places, and whether they agree with the score."""

    run: str = ""
    """Output folder of a run, whose kept responses (samples.jsonl) are audited; or else data."""
    data: str = ""
    """Rows {prompt, response} to audit: Hub id, local .jsonl/.json/.parquet/.csv file, or a folder saved by
    `datasets`."""
    output: str = ""
    """JSON file to write; empty = audit.json in the run's folder, or none for data."""
    dpo_model: str = ""
    """For data: the DPO model, log(pi_dpo / pi_ref) of which is the token reward."""
    reference: str = ""
    """For data: its reference."""
    beta1: float = RTOConfig.beta1
    """For data: scale of the token reward; a run has its own."""
    dpo_clip: float = RTOConfig.dpo_clip
    """For data: bound on the scaled token reward; 0 = off."""
    reward_model: str = ""
    """Reward model on the same tokens; its number is read behind every token."""
    data_split: str = "train"
    """Split of a Hub data set or saved folder."""
    max_rows: int = 0
    """Rows used, from the first; 0 = all."""
    response_key: str = "response"
    """Column of the response."""
    score_key: str = "score"
    """Column of the score, where there is one."""
    chat_template: str = "auto"
    """auto: the tokenizer's own, else the plain one; plain; or the path of a Jinja file."""
    template_date: str = TEMPLATE_DATE
    """YYYY-MM-DD: the day that a chat template writes where it asks for today's date."""
    packing: Literal["on", "off"] = "on"
    """Forwards as in training; off: one sequence a row, slower, and right for every family."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute type."""
    score_tokens: int = RTOConfig.score_tokens
    """Tokens (prompt + response) of a forward."""

    def __post_init__(self) -> None:
        expand_home(self)

    def validate(self) -> None:
        """Raises ConfigError on settings that contradict each other; needs no model and no data."""
        require(
            bool(self.run) != bool(self.data), "run: pass either --run, a run's folder, or --data, a file of responses"
        )
        for name in ("dpo_model", "reference"):
            given = bool(getattr(self, name))
            require(given or not self.data, f"{name}: missing; the responses of --data need --{name.replace('_', '-')}")
            require(not given or not self.run, f"{name}: the responses of --run have their token rewards; leave it out")
        self._check_read()
        for name in ("max_rows", "dpo_clip"):
            require(getattr(self, name) >= 0, f"{name}: must not be negative, got {getattr(self, name)}")
        require(self.beta1 > 0 and math.isfinite(self.beta1), f"beta1: must be positive, got {self.beta1}")
        require(self.score_tokens >= 1, f"score_tokens: must be at least 1, got {self.score_tokens}")
        if self.target:
            there = next(p for p in (self.target, *self.target.absolute().parents) if p.exists())
            require(there.is_dir() != (there == self.target), f"output: {there} is no "
                    + ("file" if there == self.target else "folder"))  # fmt: skip

    def _check_read(self) -> None:
        """ConfigError where what is given would not be read."""
        models = ("packing", "dtype", "score_tokens") if not self.reward_model else ()
        for name in (*OF_DATA, *models) if self.run else ():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            why = "no --reward-model reads its responses" if name in models else "it has its own"
            require(value == default, f"{name}: {value!r} is not read of --run, for {why}; leave it out")

    @property
    def target(self) -> Path | None:
        """The file that is written."""
        return Path(self.output) if self.output else Path(self.run) / "audit.json" if self.run else None


@dataclass(frozen=True)
class Found:
    """The responses of an audit, and what is needed to put them to a reward model."""

    responses: list[Response]
    bound: float
    sequences: list[tuple[list[int], list[int]]]
    """Token ids of (prompt, response)."""
    owner: str
    """Folder or Hub id of a model that has these tokens."""


def show(config: AuditConfig) -> Audit:
    """Prints the audit and writes it. ConfigError, with nothing written, on input that cannot work."""
    config.validate()
    found = _of_run(config) if config.run else _of_data(config)
    responses = _with_differences(config, found) if config.reward_model else found.responses
    result = audit(responses, found.bound)
    if result is None:
        name = "run" if config.run else "data"
        raise ConfigError(
            f"{name}: {getattr(config, name)!r} holds no token reward other than 0; audit a run with --beta1 above 0"
        )
    console = Console()
    for title, columns, rows, note in grids(result):
        table = Table(*columns, title=title, caption=note or None)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if config.target:
        write_atomic(config.target, json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False) + "\n")
        console.print(f"audit: {config.target}", highlight=False, soft_wrap=True)
    return result


def _of_run(config: AuditConfig) -> Found:
    folder = Path(config.run)
    kept = (folder / SAMPLES).is_file()
    require(kept, f"run: {config.run!r} holds no {SAMPLES}; runs with --report-samples above 0 keep responses")
    try:
        samples = read_samples(folder / SAMPLES)
        settings = json.loads((folder / RUN).read_text(encoding="utf-8"))["config"]
        bound, policy = bound_of(settings), settings["policy"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"run: {config.run!r} cannot be read: {error}") from error
    sequences = [(s.prompt_ids, s.token_ids) for s in samples]
    own = folder / "policy"
    owner = str(own) if (own / "config.json").exists() else policy
    if config.reward_model:
        _check_ids(config, samples)
    return Found(of_samples(samples), bound, sequences, owner)


def _check_ids(config: AuditConfig, samples: Sequence[ReportSample]) -> None:
    bad = next((i for i, s in enumerate(samples, 1) if not s.prompt_ids or len(s.token_ids) != len(s.tokens)), 0)
    require(not bad, f"run: {config.run!r}, {SAMPLES}, row {bad} has no token ids, so that no --reward-model can read "
            "it: it was written by an older version")  # fmt: skip


def _of_data(config: AuditConfig) -> Found:
    tokenizer = load_tokenizer(config.dpo_model, "dpo_model")
    template = load_template(config.chat_template, tokenizer, config.template_date)
    ours, theirs = (load_config(getattr(config, n), n).get_text_config().vocab_size for n in ("dpo_model", "reference"))
    require(ours == theirs, f"reference: {config.reference!r} has a vocabulary of {theirs} tokens, the DPO model's has "
            f"{ours}; token rewards compare the two token by token")  # fmt: skip
    sequences, scores = _rows(config, tokenizer, template)
    for name in ("dpo_model", "reference"):
        check_weights(getattr(config, name), name)
        check_max_length(
            _longest(sequences), load_config(getattr(config, name), name), f"data: the longest row ({name})"
        )
    _check_reward_model(config, config.dpo_model, sequences)
    placement, loading = _placed(config, sequences)
    dpo, base = (
        load_policy(getattr(config, n), argument=n, **loading).to(placement.device).eval()
        for n in ("dpo_model", "reference")
    )
    rollout = _rollout(sequences)
    ratio = LogRatio(dpo, base, placement).score(rollout, NO_TEXTS, torch.zeros(0))
    scaled = config.beta1 * ratio
    rewards = scaled.clamp(-config.dpo_clip, config.dpo_clip) if config.dpo_clip else scaled
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    responses = [
        Response(str(head), token_texts(tokenizer, ids), [i in special for i in ids], paid.tolist(), score)
        for (head, ids), paid, score in zip(sequences, _split(rewards, rollout), scores, strict=True)
    ]
    return Found(responses, config.dpo_clip, sequences, config.dpo_model)


def _rows(
    config: AuditConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> tuple[list[tuple[list[int], list[int]]], list[float]]:
    """((ids of prompt, of response) of each row, scores with NaN where there is none). DataError names a bad row."""
    _, read = open_source("data", config.data, config.data_split)
    table = read(config.max_rows)
    prompt_key = table.need(*PROMPT_KEYS, flag="data")
    table.need(config.response_key, flag="response-key")
    sequences, scores = [], []
    for i, raw in enumerate(table.rows):
        line = raw["line"] if table.as_text else 0
        at = f"data: {config.data!r}, " + (f"line {line}" if line else f"row {i} (from 0)")
        try:
            row = row_of(raw, table.as_text, table.literal)
            head = prompt_row(row, [prompt_key, ""], tokenizer, template)
            sequences.append((head["prompt_ids"], _response_ids(config, row, head, tokenizer, template, at)))
        except BadRow as error:
            raise DataError(f"{at}: {error.detail} ({error.reason})") from error
        except jinja2.TemplateError as error:
            raise DataError(f"{at}: the chat template refuses the conversation: {error}") from error
        score = row.get(config.score_key)
        number = isinstance(score, int | float) and not isinstance(score, bool)
        require(score is None or number, f"{at}: {config.score_key!r} is {score!r:.60}, no number; name another column "
                "by --score-key")  # fmt: skip
        scores.append(math.nan if score is None else float(score))
    return sequences, scores


def _response_ids(
    config: AuditConfig, row: dict[str, Any], head: dict[str, Any], tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate, at: str,
) -> list[int]:  # fmt: skip
    """The row's own token ids, else those of its text and an end of turn."""
    if row.get("token_ids") is not None:
        ids, size = row["token_ids"], len(tokenizer)
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < size for i in ids):
            raise DataError(f"{at}: 'token_ids' is no list of ids below {size}, the tokens of {config.dpo_model!r}")
        return ids
    response = row.get(config.response_key)
    if not isinstance(response, str):
        raise DataError(f"{at}: {config.response_key!r} is no text; name the response's column by --response-key")
    return template.encode_pair(tokenizer, json.loads(head["prompt"]), response)[1]


def _with_differences(config: AuditConfig, found: Found) -> list[Response]:
    """The responses with the reward model's prefix differences, and its numbers where they have no score."""
    if config.run:
        _check_reward_model(config, found.owner, found.sequences)
    placement, loading = _placed(config, found.sequences)
    model = load_scalar(config.reward_model, argument="reward_model", **loading).to(placement.device).eval()
    rollout = _rollout(found.sequences)
    steps = Scalar(model, True, placement).score(rollout, NO_TEXTS, torch.zeros(0))
    with torch.no_grad():
        values = over_rollout(placement, rollout, model, lambda batch: model(batch, batch.state_positions + 1))
    return [
        dataclasses.replace(
            response, differences=step.tolist(),
            score=float(value[-1]) if math.isnan(response.score) and value.numel() else response.score,
        )
        for response, step, value in zip(
            found.responses, _split(steps, rollout), _split(values, rollout), strict=True
        )
    ]  # fmt: skip


def _check_reward_model(config: AuditConfig, owner: str, sequences: Sequence[tuple[list[int], list[int]]]) -> None:
    """ConfigError where the reward model has no head, other tokens than `owner`, or too few positions."""
    if path := config.reward_model:
        check_reward_head(path, "reward_model")
        tokenizer = load_tokenizer(owner, "policy")
        special = frozenset(tokenizer.convert_ids_to_tokens(sorted({i for s in sequences for part in s for i in part})))
        check_tokens(path, "reward_model", tokenizer, owner, special, exact=False)
        check_max_length(_longest(sequences), load_config(path, "reward_model"), "the longest response with its prompt")


def _longest(sequences: Sequence[tuple[list[int], list[int]]]) -> int:
    return max((len(head) + len(ids) for head, ids in sequences), default=1)


def _placed(config: AuditConfig, sequences: Sequence[tuple[list[int], list[int]]]) -> tuple[Placement, dict[str, Any]]:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    settings = RTOConfig(dtype=config.dtype, packing=config.packing, score_tokens=config.score_tokens)
    return place(settings, device, config.score_tokens, _longest(sequences))


def _rollout(sequences: Sequence[tuple[list[int], list[int]]]) -> Rollout:
    requests = [Request(tuple(head), i, i, 0, 0) for i, (head, _) in enumerate(sequences)]
    ids = [response for _, response in sequences]
    return Rollout.from_lists(requests, ids, [[0.0] * len(r) for r in ids], [False] * len(ids), version=0)


def _split(values: Tensor, rollout: Rollout) -> tuple[Tensor, ...]:
    return values.split(rollout.response_lens.tolist())
