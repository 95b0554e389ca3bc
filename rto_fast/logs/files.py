"""The files of a run that people read: run.json, metrics.jsonl, samples.jsonl.

Every whole file is written beside its place and moved there (a kill leaves the old one), every appended line
is flushed at once, and every reader forgives a last line that a kill has torn.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rto_fast.errors import StorageError

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
RUN = "run.json"
REPORT = "report.html"


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


WRITERS = ("PytorchStreamWriter", "inline_container", "No space left", "I/O error", "File too large")
"""How torch's and safetensors' writers begin what is an OSError elsewhere."""


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """StorageError where what is written inside to `target` finds no room, or cannot be written for another reason."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if not isinstance(error, OSError) and not any(sign in reason for sign in WRITERS):
            raise
        raise StorageError(
            f"{target} cannot be written: {reason[:200]}. What was saved before is whole; make room and go on with "
            "--resume auto"
        ) from error


@contextmanager
def folder_aside(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into; it takes that place when the block has ended, else it is deleted.

    Its files get the umask's mode, whatever wrote them: safetensors shuts out everyone but the owner. Raises
    StorageError where it cannot be written.
    """
    aside, old = (folder.with_name(f"{kind}-{folder.name}") for kind in ("partial", "replaced"))
    for left in (aside, old):  # by a kill in the middle of this
        shutil.rmtree(left, ignore_errors=True)
    try:
        with writing(folder):
            aside.mkdir(parents=True)
            yield aside
            mask = _umask()
            for path in aside.rglob("*"):
                path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
                fsync(path)
            if folder.exists():
                os.rename(folder, old)
            os.rename(aside, folder)
            fsync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def fsync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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


WHOLE_BYTES = 2**30
"""Up to here a file is hashed whole, beyond it `PIECES` pieces of 1 MiB evenly spread: training moves every weight."""
PIECES = 256


def fingerprint(path: Path) -> str:
    """The size in bytes, and the hash."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as f:
        if size <= WHOLE_BYTES:
            digest = hashlib.file_digest(f, "sha256")
        else:
            for i in range(PIECES):
                f.seek(i * (size - 2**20) // (PIECES - 1))
                digest.update(f.read(2**20))
    return f"{size} {digest.hexdigest()[:32]}"
