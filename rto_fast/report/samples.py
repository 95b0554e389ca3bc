"""Sampled responses token by token, as the report shows them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rto_fast.contract import ResponseTexts, Rollout, Scores, Targets
from rto_fast.data.tokenizer import token_texts
from rto_fast.logs.files import json_line, mend, read_rows

TOKEN_FIELDS = ("token_reward", "advantage", "dpo_reward", "kl", "value")
"""The figures that every token of a `ReportSample` carries."""


@dataclass(frozen=True)
class ReportSample:
    """One sampled response, with H tokens; raises ValueError when a list has another length."""

    prompt: str
    """Prompt as text, chat template included."""
    tokens: list[str]
    """[H] text of each response token (see `token_texts`)."""
    token_reward: list[float]
    """[H] Eq. 4.7: DPO reward - beta2 * KL, the score added at the last token."""
    advantage: list[float]
    """[H] GAE."""
    dpo_reward: list[float]
    """[H] clip(beta1 * log(pi_dpo / pi_ref)), or the sum of all sources of token rewards."""
    kl: list[float]
    """[H] log(pi / pi_ref), nats, unscaled."""
    value: list[float]
    """[H] the critic before the token."""
    score: float
    """Score of the whole response."""
    truncated: bool
    """Cut at the length limit."""
    step: int
    """Iteration that sampled it."""
    extra: dict[str, float] = field(default_factory=dict)
    """More figures of the response, such as each reward source's."""
    label: str = ""
    """Which run it is from, where one report shows several."""
    prompt_ids: list[int] = field(default_factory=list)
    """The prompt's tokens; none in files of older versions."""
    token_ids: list[int] = field(default_factory=list)
    """[H] the response's tokens; none in files of older versions."""

    def __post_init__(self) -> None:
        for name in TOKEN_FIELDS:
            length = len(getattr(self, name))
            if length != len(self.tokens):
                raise ValueError(f"ReportSample.{name}: {length} values for {len(self.tokens)} tokens")


def special_text(text: str) -> bool:
    """Whether a token's text (see `token_texts`) is the name of a special token, such as <eos> or [SEP]."""
    return bool(re.fullmatch(r"<[^<>\s]+>|\[[A-Z_]{2,}\]", text))


def read_samples(path: Path | str) -> list[ReportSample]:
    """Samples of a samples.jsonl, oldest first; figures that were not finite come back as NaN.

    Raises ValueError naming the file and row when a row is no sample.
    """
    samples = []
    for number, row in enumerate(read_rows(path), 1):
        try:
            for name in TOKEN_FIELDS:
                row[name] = [math.nan if v is None else v for v in row[name]]
            row["score"] = math.nan if row["score"] is None else row["score"]
            row["extra"] = {k: math.nan if v is None else v for k, v in row["extra"].items()}
            samples.append(ReportSample(**row))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}, row {number}: not a sampled response ({error!r})") from None
    return samples


def append_samples(path: Path | str, samples: Iterable[ReportSample]) -> None:
    """Appends samples to a samples.jsonl, one JSON object a line, flushed; cleans a torn end first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mend(path)
    with path.open("a", encoding="utf-8") as f:
        f.write("".join(json_line(dataclasses.asdict(s)) for s in samples))


def report_samples(
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    scores: Scores,
    targets: Targets,
    texts: ResponseTexts,
    rows: Iterable[int],
    step: int,
) -> list[ReportSample]:
    """The sequences at `rows`, with reward, advantage (whitened), DPO reward, KL and value of each token."""
    mean, rstd = targets.whiten
    whitened = (targets.advantages - mean) * rstd
    columns = {
        "token_reward": targets.rewards,
        "advantage": whitened,
        "dpo_reward": targets.dense,
        "kl": targets.kl,
        "value": scores.values,
    }
    cu = rollout.cu_responses.tolist()
    prompts, responses = rollout.prompts(), rollout.responses()
    return [
        ReportSample(
            prompt=texts.prompts[i],
            tokens=token_texts(tokenizer, responses[i].tolist()),
            **{name: values[cu[i] : cu[i + 1]].float().tolist() for name, values in columns.items()},
            score=float(scores.score[i]),
            truncated=bool(rollout.truncated[i]),
            step=step,
            prompt_ids=prompts[i].tolist(),
            token_ids=responses[i].tolist(),
        )
        for i in rows
    ]
