"""How a refusal looks: its exit code, its one message, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path

REFUSED, STOPPED = 2, 3
GOOD = {"prompt": "Once there was a fox.", "chosen": "It ran to the hill.", "rejected": "It found a lamp."}


def contents(folder: Path) -> dict[str, bytes] | None:
    """Every file under the folder; None where it does not exist."""
    if not folder.exists():
        return None
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def message_of(stderr: str) -> str:
    """The one error in `stderr`, which must hold no traceback."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    assert stderr.rstrip().endswith(lines[0]), f"the message is not the last word, or has more than one line: {stderr}"
    return lines[0]
