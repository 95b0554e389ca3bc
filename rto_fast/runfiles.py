"""What a run leaves behind for people to read: run.json, metrics.jsonl, samples.jsonl.

Every whole file is written beside its place and moved there (a kill leaves the old one), every appended line
is flushed at once, and every reader forgives a last line that a kill has torn.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
RUN = "run.json"
REPORT = "report.html"

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
    """[H] clip(beta1 * log(pi_dpo / pi_ref))."""
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

    def __post_init__(self) -> None:
        for name in TOKEN_FIELDS:
            length = len(getattr(self, name))
            if length != len(self.tokens):
                raise ValueError(f"ReportSample.{name}: {length} values for {len(self.tokens)} tokens")


def duration(seconds: float) -> str:
    """Seconds as `42s`, `3m 07s` or `5h 12m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def write_atomic(path: Path | str, text: str) -> None:
    """Writes UTF-8 text so that a kill leaves the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, mode)  # mkstemp's own mode shuts out everyone but the owner
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def finite_or_none(value: object) -> object:
    """`value` with every NaN and infinity, which JSON lacks, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): finite_or_none(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(v) for v in value]
    return value


def json_line(row: dict) -> str:
    return json.dumps(finite_or_none(row), ensure_ascii=False, allow_nan=False) + "\n"


def read_rows(path: Path | str) -> list[dict]:
    """The objects of a JSONL file; [] when there is none. A torn last line is left out.

    Raises ValueError naming file and line for any other line that is no JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # malformed JSON or, at a torn end, half a UTF-8 character
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not JSON") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


def read_metrics(path: Path | str) -> list[dict]:
    """Rows of a metrics.jsonl, one dict a logged step: "step" and metric name -> number or None."""
    return read_rows(path)


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


def mend(path: Path) -> None:
    """Rewrites a JSONL file whose last line a kill has torn, so that the next line starts afresh."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        write_atomic(path, "".join(map(json_line, read_rows(path))))


def drop_after(path: Path | str, step: int) -> list[dict]:
    """Drops the rows of a JSONL file whose "step" is above `step`, atomically; returns the rows kept."""
    path = Path(path)
    rows = read_rows(path)
    kept = [row for row in rows if row.get("step", 0) <= step]
    if len(kept) < len(rows):
        write_atomic(path, "".join(map(json_line, kept)))
    elif path.exists():
        mend(path)
    return kept
