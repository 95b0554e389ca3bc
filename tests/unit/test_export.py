"""A checkpoint exported without its run is the run's own export."""

from __future__ import annotations

import pytest
from loop_helpers import small_run


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The output folder of a short run with checkpoints of both iterations."""
    import os

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from rto_fast import trainer
    from rto_fast.config import RTOConfig

    folder = tmp_path_factory.mktemp("export") / "run"
    trainer.train(RTOConfig(**(small_run(tiny, folder) | {"iterations": 2, "save_every": 1, "keep_last": 2})))
    return folder


def test_newest_checkpoint_equals_the_runs_export(finished, tmp_path):
    """Policy and critic: the same tensors bit for bit, the same config, tokenizer and template."""
    from safetensors.torch import load_file

    from rto_fast.export import ExportConfig, export_checkpoint

    folders = export_checkpoint(ExportConfig(run=str(finished), to=str(tmp_path / "out")))
    assert [f.name for f in folders] == ["critic", "policy"]
    for folder in folders:
        theirs, ours = (load_file(f / "model.safetensors") for f in (finished / folder.name, folder))
        assert theirs.keys() == ours.keys()
        assert all((theirs[name] == ours[name]).all() for name in theirs)
        for name in ("config.json", "tokenizer.json", "rto_template.json"):
            assert (folder / name).read_text() == (finished / folder.name / name).read_text()


def test_an_earlier_checkpoint_differs(finished, tmp_path):
    from safetensors.torch import load_file

    from rto_fast.export import ExportConfig, export_checkpoint

    export_checkpoint(ExportConfig(run=str(finished), to=str(tmp_path / "out"), step=1))
    first, last = (load_file(f / "policy" / "model.safetensors") for f in (tmp_path / "out", finished))
    assert any((first[name] != last[name]).any() for name in first)


@pytest.mark.parametrize(
    ("change", "names"),
    [({"step": 7}, "step: no checkpoint 7"), ({"run": "nowhere"}, "nowhere"), ({"to": "."}, "to: . exists")],
)
def test_bad_requests_name_what_is_wrong(finished, tmp_path, change, names):
    from rto_fast.errors import ConfigError
    from rto_fast.export import ExportConfig, export_checkpoint

    settings = {"run": str(finished), "to": str(tmp_path / "out")} | change
    with pytest.raises(ConfigError, match=names):
        export_checkpoint(ExportConfig(**settings))
    assert not (tmp_path / "out").exists()
