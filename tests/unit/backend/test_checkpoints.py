"""Checkpoints that are damaged, foreign, or that find no room."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
from loop_helpers import small_run

from rto_fast import distributed, trainer
from rto_fast.backend import checkpoints
from rto_fast.backend.checkpoints import Checkpoints, checkpoint_steps, find_checkpoint
from rto_fast.config import RTOConfig
from rto_fast.errors import ConfigError, StorageError
from rto_fast.export import ExportConfig, export_checkpoint
from rto_fast.logs.files import fingerprint

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """A run of three iterations that kept the last two checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer.train(RTOConfig(**small_run(tiny, folder, iterations=3, save_every=1, report=False)))
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def settings(tiny, run: Path, **changes) -> RTOConfig:
    return RTOConfig(**small_run(tiny, run, iterations=3, save_every=1, report=False, resume="auto") | changes)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", ["cut", "gone", "no json", "swapped"])
def test_a_damaged_checkpoint_gives_way_to_the_older_one(tiny, finished, run, capsys, harm):
    """And it is said; the run ends as it would have, and what was damaged is kept aside."""
    newest = run / "checkpoints" / "step-00000003"
    file = newest / "policy" / "mp_rank_00_model_states.pt"
    if harm == "cut":
        cut(file)
    elif harm == "gone":
        file.unlink()
    elif harm == "swapped":
        shutil.copy(run / "checkpoints" / "step-00000002" / file.relative_to(newest), file)
    else:
        (newest / "state.json").write_text("")
    assert find_checkpoint(run)[0].name == "step-00000002"
    with pytest.raises(ConfigError, match="run: no checkpoint asked for is whole"):
        find_checkpoint(run, step=3)
    trainer.train(settings(tiny, run))
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: checkpoint 3 is not whole and is left out: " in said
    assert "from step 2" in said
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["aside-step-00000003", "step-00000002", "step-00000003"]
    weights = [(folder / "policy" / "model.safetensors").read_bytes() for folder in (finished, run)]
    assert weights[0] == weights[1]


def test_no_whole_checkpoint_is_refused(tiny, run):
    for path in run.glob("checkpoints/step-*/tensors.pt"):
        cut(path)
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"resume: checkpoint 3 is not whole .*tensors.pt has \d+ bytes, \d+ were"):
        trainer.train(settings(tiny, run))
    with pytest.raises(ConfigError, match=r"run: no checkpoint asked for is whole: .*tensors.pt"):
        export_checkpoint(ExportConfig(run=str(run), to=str(run.parent / "out")))
    assert (run / "metrics.jsonl").read_text() == before
    assert not (run.parent / "out").exists()


def test_foreign_names_among_the_checkpoints_stay(tiny, run):
    """They neither break a save nor are deleted; a folder under the name of the next checkpoint is moved aside."""
    root = run / "checkpoints"
    shutil.rmtree(root / "step-00000003")
    foreign = ["step-foo", "step-", "step-7", "partial-mine", "notes", "step-00000003"]
    for name in foreign:
        (root / name).mkdir()
        (root / name / "mine").write_text(name)
    for name in ("step-foo", "step-"):
        (root / name / "state.json").write_text("{}")
    (root / "partial-00000009").write_text("a file")
    assert checkpoint_steps(root) == [2]
    trainer.train(settings(tiny, run))
    assert checkpoint_steps(root) == [2, 3]
    assert (root / "partial-00000009").read_text() == "a file"
    for name in foreign:
        there = f"aside-{name}" if name == "step-00000003" else name
        assert (root / there / "mine").read_text() == name


def test_rows_of_a_run_that_cannot_be_read(tiny, run):
    """They are its figures: nothing is dropped, nothing is written before they are mended."""
    log = run / "metrics.jsonl"
    log.write_text("no figures\n" + log.read_text())
    before = log.read_bytes()
    with pytest.raises(ConfigError, match=r"resume: .*metrics.jsonl, line 1: not JSON; mend it"):
        trainer.train(settings(tiny, run))
    assert log.read_bytes() == before


def test_a_finished_run_without_checkpoints_is_not_started_over(tiny, run):
    shutil.rmtree(run / "checkpoints")
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    with pytest.raises(ConfigError, match=r"resume: .* holds a finished run \(policy\) that kept no checkpoint"):
        trainer.train(settings(tiny, run))
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before


def test_a_checkpoint_of_another_user(tiny, run, monkeypatch):
    """Refused before anything is unpickled, for resuming and for exports, unless the folder is trusted."""
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    expected = "checkpoint 3: .* belongs to another user, .* --trust-run-folder"
    with pytest.raises(ConfigError, match=expected):
        trainer.train(settings(tiny, run))
    with pytest.raises(ConfigError, match=expected):
        export_checkpoint(ExportConfig(run=str(run), to=str(run.parent / "out")))
    trainer.train(settings(tiny, run, trust_run_folder=True))
    export_checkpoint(ExportConfig(run=str(run), to=str(run.parent / "out"), trust_run_folder=True))


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_tensors_run_no_code(tiny, run, tmp_path):
    import pickle

    import torch

    path = run / "checkpoints" / "step-00000003" / "tensors.pt"
    torch.save({"average": Payload(tmp_path / "owned"), "rng": None, "ahead": None}, path)
    state = path.with_name("state.json")
    record = json.loads(state.read_text())
    record["files"]["tensors.pt"] = fingerprint(path)
    state.write_text(json.dumps(record))
    with pytest.raises(pickle.UnpicklingError):
        Checkpoints(settings(tiny, run)).load(3, {})
    assert not (tmp_path / "owned").exists()


def test_a_full_disk_leaves_the_older_checkpoint(tiny, run):
    """Every file is bounded here as a full disk bounds it; torch's own writers meet it."""
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"step-00000003 cannot be written: .*--resume auto"):
            trainer.train(settings(tiny, run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000002"]
    trainer.train(settings(tiny, run))
    assert checkpoint_steps(run / "checkpoints") == [2, 3]


def test_home_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = RTOConfig(policy="~/p", output_dir="~/out", reward_model=("~/r", "org/r"), reward_fn=("~/f.py:f",))
    assert (config.policy, config.output_dir) == (f"{tmp_path}/p", f"{tmp_path}/out")
    assert config.reward_model == (f"{tmp_path}/r", "org/r")
    assert config.reward_fn == (f"{tmp_path}/f.py:f",)


@pytest.mark.parametrize("refused", [False, True])
def test_rank_0_decides_which_checkpoint_all_resume(tiny, run, monkeypatch, refused):
    """The others neither read 130 GB to the same end, nor come to another where a file system lags."""
    first = Checkpoints(settings(tiny, run, **({"policy_lr": 1e-5} if refused else {})))
    sent = []
    monkeypatch.setattr(distributed, "broadcast_object", lambda item: sent.append(item) or item)
    if refused:
        with pytest.raises(ConfigError, match="policy_lr") as error:
            first.read()
    else:
        assert first.read()[0] == 3
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    other = Checkpoints(settings(tiny, run))
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "broadcast_object", lambda item: sent[0])
    monkeypatch.setattr(checkpoints, "read_record", lambda *_: pytest.fail("rank 1 reads checkpoints"))
    if refused:
        with pytest.raises(ConfigError) as same:
            other.read()
        assert str(same.value) == str(error.value)
    else:
        assert other.read()[0] == 3
