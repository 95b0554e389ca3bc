"""mypy over rto_fast, whose errors may only become fewer.

    python tools/type_check.py             fails where a file has more errors than tools/type_errors.json allows
    python tools/type_check.py --update    lowers what is allowed to what there is

Files that are not in the list must be clean. CLEAN stay so: they are what stages hand to one another.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALLOWED = ROOT / "tools" / "type_errors.json"
CLEAN = (
    "rto_fast/contract.py", "rto_fast/config/", "rto_fast/errors.py", "rto_fast/algo/", "rto_fast/updates/",
    "rto_fast/rollout/engine.py", "rto_fast/scoring/", "rto_fast/data/",
)  # fmt: skip


def errors() -> dict[str, list[str]]:
    """{file: its errors}; exits where mypy itself fails."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "rto_fast"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(done.stdout + done.stderr)
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if match := re.match(r"(\S+\.py):\d+: error: ", line):
            found.setdefault(match[1], []).append(line)
    return found


def verdict(found: dict[str, int], allowed: dict[str, int]) -> list[str]:
    """Files with more errors than are allowed, and entries that allow what must be clean."""
    more = [
        f"{file}: {n} errors, {allowed.get(file, 0)} allowed" for file, n in found.items() if n > allowed.get(file, 0)
    ]
    return more + [f"{file}: must be clean, {ALLOWED.name} allows errors" for file in allowed if file.startswith(CLEAN)]


def lowered(found: dict[str, int], allowed: dict[str, int]) -> dict[str, int]:
    """What is allowed from now on: never more than before."""
    return {file: min(n, found[file]) for file, n in sorted(allowed.items()) if found.get(file)}


def main() -> None:
    lines = errors()
    found = dict(Counter({file: len(of) for file, of in lines.items()}))
    allowed: dict[str, int] = json.loads(ALLOWED.read_text())
    if "--update" in sys.argv[1:]:
        allowed = lowered(found, allowed)
        ALLOWED.write_text(json.dumps(allowed, indent=1) + "\n")
    if wrong := verdict(found, allowed):
        shown = [line for file, of in lines.items() if len(of) > allowed.get(file, 0) for line in of]
        sys.exit("\n".join([*shown, "", *wrong]))
    print(f"types: {sum(found.values())} errors, {sum(allowed.values())} allowed")


if __name__ == "__main__":
    main()
