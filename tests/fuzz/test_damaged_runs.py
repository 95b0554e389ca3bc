"""A run folder that was damaged: `--resume auto` ends where the whole run ended, bit for bit, or refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loop_helpers import small_run
from outcomes import Tally, command, examples
from recipe_helpers import flags_of
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_rank")

ITERATIONS = 3
damage = st.lists(
    st.tuples(
        st.sampled_from(["cut", "empty", "delete", "swap", "append", "unfinished"]),
        st.integers(0, 10**6), st.integers(0, 10**6),
    ),
    min_size=1, max_size=2,
)  # fmt: skip


def settings(tiny, folder: Path) -> dict[str, object]:
    return small_run(
        tiny, folder, iterations=ITERATIONS, save_every=1, keep_last=ITERATIONS, resume="auto", report=False,
        sync_proof=False, rollout_engine="transformers", max_response_length=6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    """(policy of a whole run, the same run as it was after its second checkpoint)."""
    whole = tmp_path_factory.mktemp("runs") / "whole"
    assert not command(["rto", *flags_of(settings(tiny, whole))]).code
    policy = load_file(whole / "policy" / "model.safetensors")
    shutil.rmtree(whole / "checkpoints" / f"step-{ITERATIONS:08d}")
    for exported in ("policy", "critic"):
        shutil.rmtree(whole / exported)
    log = whole / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[: ITERATIONS - 1]))
    return policy, whole


def harm(folder: Path, kind: str, which: int, where: int) -> str:
    """Damages one file of the folder, or two."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    file, other = files[which % len(files)], files[where % len(files)]
    data = file.read_bytes()
    if kind == "cut":
        file.write_bytes(data[: where % (len(data) + 1)])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "delete":
        file.unlink()
    elif kind == "swap":
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif kind == "append":
        file.write_bytes(data + data[: where % 100])
    elif kind == "unfinished":
        (folder / "checkpoints" / f"partial-{where:08d}").mkdir(exist_ok=True)
    return f"{kind} {file.relative_to(folder)} {other.relative_to(folder)}"


def test_damaged_runs_resume_right_or_are_refused(tiny, stopped, tmp_path):
    policy, before = stopped

    @given(harms=damage)
    @examples(quick=6, full=100)
    def resume_any(harms):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        done = [harm(folder, *one) for one in harms if any(p.is_file() for p in folder.rglob("*"))]
        end = command(["rto", *flags_of(settings(tiny, folder))])
        if end.code:
            assert not (folder / "policy").exists(), (done, end)
            tally("refused")
            return
        resumed = load_file(folder / "policy" / "model.safetensors")
        assert all(resumed[name].equal(policy[name]) for name in policy), done
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)), (done, steps)
        assert steps[-1] == ITERATIONS, (done, steps)
        tally("resumed")

    with Tally().shown("checkpoints") as tally:
        resume_any()
        assert tally["resumed"]
