"""Recipes started as a user starts them: in this process, or by DeepSpeed's launcher on several ranks."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys

import pytest
from launches import Result, environment, free_port
from loop_helpers import ROOT

SHARED = ROOT.parent / "shared"
"""Real models and data, where a checkout has them beside it."""
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")
RECIPES = tuple(sorted(p.name for p in (ROOT / "recipes").glob("*.py")))


def flags_of(settings: dict[str, object]) -> list[str]:
    """{"max_length": 64, "reward_fn": ("a", "b")} -> ["--max-length", "64", "--reward-fn", "a", "b"]."""
    out = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple | list) else (value,)
        out += ["--" + name.replace("_", "-"), *map(str, values)]
    return out


def run_recipe(recipe: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs `recipes/<recipe> flags` in this process; returns its exit code."""
    path = ROOT / "recipes" / recipe
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), *flags])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def run_deepspeed(recipe: str, flags: list[str], *, ranks: int = 2, timeout_s: float = 480) -> Result:
    """`deepspeed --num_accelerators ranks recipes/<recipe> flags` on CPUs, killed with all its ranks at the limit."""
    command = [
        "deepspeed", "--num_accelerators", str(ranks), "--master_addr", "127.0.0.1", "--master_port", str(free_port()),
        f"recipes/{recipe}", *flags,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Result(process.returncode, output)
