"""Output folders and checkpoints of other runs."""

from __future__ import annotations

import socket

import launches
import pytest
from recipe_helpers import flags_of
from refusal_helpers import REFUSED

pytestmark = pytest.mark.usefixtures("one_rank")


def test_output_that_holds_a_run(refused, settings, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text("{}\n")
    for recipe in settings:
        refused(recipe, rf"output_dir: {out} already holds a run; pass --resume auto .*or another --output-dir")
        refused(recipe, r"output_dir: .*metrics.jsonl is a file", output_dir=out / "metrics.jsonl")
        refused(recipe, r"output_dir: .*metrics.jsonl is a file", output_dir=out / "metrics.jsonl" / "deeper")


def test_checkpoint_of_another_config(refused, run, tmp_path):
    """And of another number of ranks; what is there stays as it was, and with the same settings the run goes on."""
    assert run("rm_llama3.py", save_every=2, epochs=0.5, eval_fraction=0)[0] == 0
    refused("rm_llama3.py", r"resume: .*step-00000004 was written by a run with other settings: lr=1e-06 \(now 0.001\)",
            resume="auto", lr=0.001, epochs=0.5, eval_fraction=0)  # fmt: skip
    state = tmp_path / "out" / "checkpoints" / "step-00000004" / "state.json"
    record = state.read_text()
    state.write_text(record.replace('"world_size": 1', '"world_size": 2'))
    refused("rm_llama3.py", "resume: .* was written by 2 ranks, this run has 1", resume="auto", epochs=0.5,
            eval_fraction=0)  # fmt: skip
    state.write_text(record)


def test_checkpoint_goes_on_with_other_free_settings(run):
    """The twin of the test above: what may change does, so that refusing is no accident."""
    settings = {"epochs": 0.5, "eval_fraction": 0}
    assert run("rm_llama3.py", save_every=2, **settings)[0] == 0
    memory = {"micro_tokens": 64, "gradient_checkpointing": True}
    code, stdout, _ = run("rm_llama3.py", save_every=1, keep_last=1, resume="auto", **settings, **memory)
    assert (code, "from step 4" in stdout) == (0, True)


def test_rto_checkpoint_of_another_config(refused, run):
    assert run("rto_llama3.py", save_every=1, iterations=1)[0] == 0
    refused("rto_llama3.py", r"resume: .*step-00000001 was written by .* other settings: beta1=0.05 \(now 0.2\)",
            resume="auto", iterations=1, beta1=0.2)  # fmt: skip
    refused("rto_llama3.py", r"output_dir: .* already holds a run", iterations=1)


def test_a_busy_port(settings, launch, monkeypatch):
    """The launcher's port is taken: one line that names the port and the flag. (One rank alone needs no port.)"""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        monkeypatch.setattr(launches, "free_port", lambda: port)
        result = launch(["recipes/rm_llama3.py", *flags_of(settings["rm_llama3.py"])], ranks=2)
    assert result.returncode == REFUSED, result.output
    assert f"error: master_port: another process listens on port {port} " in result.output
    assert "--master_port N" in result.output
    assert "Traceback" not in result.output
