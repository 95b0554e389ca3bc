"""Settings of every kind, by flags: the run ends well, or is refused with the setting named and nothing written."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loop_helpers import small_run
from outcomes import Tally, command, examples
from recipe_helpers import flags_of

from rto_fast.commands import COMMANDS
from rto_fast.errors import REFUSED

pytestmark = pytest.mark.usefixtures("one_rank")

STAGES = ("sft", "rm", "dpo", "rto", "ppo")
WORK = {
    "iterations", "epochs", "ppo_epochs", "rollout_batch", "responses_per_prompt", "rollout_oversample", "batch",
    "reward_retries", "reward_timeout_s", "rollout_timeout_s", "vllm_start_timeout_s", "wandb_project", "output_dir",
    "data_workers",
}  # fmt: skip
"""Fields of which a large value asks for hours or gigabytes, rightly; and those that reach for other machines."""

junk = st.sampled_from(["", "x", "-1", "nan", "1e", "0x10", "None", "é", "a b", "--"])
integers = st.one_of(st.integers(-1, 9), st.sampled_from([16, 63, 64, 10**6, 2**31, 2**63]), junk)
floats = st.one_of(
    st.sampled_from([-1.0, 0.0, 1e-30, 1e-4, 0.05, 0.5, 1.0, 2.0, 1e30, float("nan"), float("inf")]), junk
)
paths = ("policy", "dpo", "reward", "prompts", "pairs", "texts")


def values(name: str, kind: Any, tiny) -> st.SearchStrategy:
    """What a user may write behind the flag of a field of this type; a list is several words."""
    if get_origin(kind) is Literal:
        return st.one_of(st.sampled_from(get_args(kind)), junk)
    if get_origin(kind) is tuple:
        inner = values(name, get_args(kind)[0], tiny)
        return st.lists(inner, max_size=3).filter(lambda words: not any(isinstance(w, list) for w in words))
    if kind is bool:
        return st.one_of(st.booleans(), junk)
    if kind is int:
        return st.one_of(st.integers(-1, 3), junk) if name in WORK else integers
    if kind is float or float in get_args(kind):
        return st.one_of(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), junk) if name in WORK else floats
    files = st.sampled_from([getattr(tiny, n) for n in paths])
    odd = st.sampled_from(["nobody/nothing", "/nowhere/at/all", "~", ".", "/", "x" * 300, "http://127.0.0.1:9", "a:b"])
    columns = st.sampled_from(["prompt", "chosen", "rejected", "response", "score"])
    return st.one_of(files, odd, columns, junk)


def base(tiny, stage: str) -> dict[str, object]:
    """Settings of a run that takes a second or two."""
    loop = small_run(tiny, "", iterations=1, max_response_length=6, sync_proof=False, report=False)
    loop = {k: v for k, v in loop.items() if k != "output_dir"} | {"rollout_engine": "transformers"}
    stages = {"rto": loop, "ppo": {k: v for k, v in loop.items() if k != "dpo_model"}}
    data = tiny.texts if stage == "sft" else tiny.pairs
    common = {n: loop[n] for n in ("dtype", "gradient_checkpointing", "data_cache", "data_workers")}
    return stages.get(stage) or common | {
        "model": tiny.policy, "data": data, "data_split": "train", "eval_split": "", "max_length": 48, "batch": 8,
        "max_rows": 24,
    }  # fmt: skip


@st.composite
def changes(draw, tiny) -> tuple[str, dict[str, object]]:
    """(stage, changed fields and their values)."""
    stage = draw(st.sampled_from(STAGES))
    kinds = get_type_hints(type(COMMANDS[stage].defaults))
    names = [f.name for f in dataclasses.fields(COMMANDS[stage].defaults) if f.name != "output_dir"]
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    return stage, {name: draw(values(name, kinds[name], tiny)) for name in chosen}


def test_any_settings_run_or_are_refused(tiny, tmp_path):
    folders = (tmp_path / f"out{n}" for n in itertools.count())

    @given(case=changes(tiny))
    @examples(quick=25, full=200)
    def run_any(case):
        stage, changed = case
        folder = next(folders)
        end = command([stage, *flags_of(base(tiny, stage) | changed | {"output_dir": folder})])
        if end.code == REFUSED:
            assert not folder.exists(), f"{end.message}: {[str(p) for p in folder.rglob('*')]}"
        elif not end.code:
            assert whole(folder, stage), list(folder.iterdir())
        shutil.rmtree(folder, ignore_errors=True)
        tally({0: "ran", REFUSED: "refused"}.get(end.code, "stopped"))

    with Tally().shown("settings") as tally:
        run_any()
        assert tally["ran"] > sum(tally.values()) / 10


def whole(folder: Path, stage: str) -> bool:
    """Whether the run's model is there, or its adapter."""
    model = folder / ("policy" if stage in ("rto", "ppo") else "model")
    return any((model / name).exists() for name in ("model.safetensors", "adapter_model.safetensors"))
