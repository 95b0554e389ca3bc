"""RunLogger: what lands in the files, what a kill and a resume leave, and what the console shows."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from loop_helpers import ROOT
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rto_fast.data.tokenizer import token_texts
from rto_fast.errors import ConfigError
from rto_fast.logs import console
from rto_fast.logs.console import LiveDisplay
from rto_fast.logs.files import drop_after, duration, read_metrics, read_rows, write_atomic
from rto_fast.logs.run_logger import RunLogger
from rto_fast.report.samples import ReportSample, append_samples, read_samples


def logger(folder, *, total=4, rank=0, start=0, config=None, stage="RTO"):
    return RunLogger(
        folder, stage=stage, total_steps=total, rank=rank, config=config or {}, start_step=start
    )  # fmt: skip


def sample(step=1, tokens=("a", "b"), **changes):
    n = len(tokens)
    fields = {
        "prompt": "p", "tokens": list(tokens), "token_reward": [0.5] * n, "advantage": [-0.5] * n,
        "dpo_reward": [0.0] * n, "kl": [0.1] * n, "value": [1.0] * n, "score": 2.0, "truncated": False,
        "step": step, "extra": {},
    }  # fmt: skip
    return ReportSample(**{**fields, **changes})


def test_row_holds_metrics_phases_rates_and_memory(tmp_path):
    with logger(tmp_path) as log:
        with log.phase("rollout"):
            time.sleep(0.05)
            log.progress(100, 1, 2)
            log.progress(200, 2, 2)
        with log.phase("train"):
            log.progress(50)
        with log.phase("sync"):
            pass
        log.log(1, {"reward/score": torch.tensor(0.25), "policy/lr": 1e-6})
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["step"] == 1
    assert row["reward/score"] == 0.25
    assert 0.05 <= row["time/rollout_s"] < 5
    assert row["rate/rollout_tokens_s"] == pytest.approx(300 / row["time/rollout_s"])
    assert 0 < row["rate/tokens_s"] <= row["rate/rollout_tokens_s"]
    assert row["time/sync_s"] >= 0
    assert row["time/rollout_share"] > 0.5
    assert 1 >= sum(row[f"time/{name}_share"] for name in ("rollout", "train", "sync")) > 0.9
    assert "rate/sync_tokens_s" not in row  # no tokens counted, no rate claimed
    assert row["memory/peak_gib"] > 0.01
    assert row["run/elapsed_s"] >= row["time/rollout_s"]


def test_phases_start_anew_with_each_row_and_inner_phases_stop_the_outer(tmp_path):
    with logger(tmp_path) as log:
        with log.phase("outer"):
            time.sleep(0.03)
            with log.phase("inner"):
                time.sleep(0.06)
            time.sleep(0.03)
        log.log(1, {})
        with log.phase("outer"):
            pass
        log.log(2, {})
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["time/inner_s"] >= 0.06
    assert first["time/outer_s"] >= 0.06
    total = first["time/inner_s"] + first["time/outer_s"]
    assert total == pytest.approx(first["run/elapsed_s"], abs=0.05)
    assert second["time/outer_s"] < 0.05
    assert "time/inner_s" not in second


def test_a_phase_that_raises_is_closed_and_the_error_passes(tmp_path):
    with logger(tmp_path) as log:
        with pytest.raises(ValueError, match="boom"), log.phase("train"):
            raise ValueError("boom")
        with pytest.raises(RuntimeError, match="no phase is open"):
            log.progress(1)
        log.log(1, {})
    assert "time/train_s" in read_metrics(tmp_path / "metrics.jsonl")[0]


def test_non_finite_values_are_null_in_jsonl_and_absent_in_tensorboard(tmp_path):
    with logger(tmp_path) as log:
        log.log(1, {"policy/loss": math.nan, "critic/loss": -math.inf, "policy/lr": 3e-6})
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row["policy/loss"] is None
    assert row["critic/loss"] is None
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert "policy/loss" not in board.Tags()["scalars"]
    assert board.Scalars("policy/lr")[0].value == pytest.approx(3e-6)


def test_a_metric_that_is_no_number_is_refused_by_name(tmp_path):
    with logger(tmp_path) as log, pytest.raises(TypeError, match="policy/loss"):
        log.log(1, {"policy/loss": "low"})


def test_rows_are_on_disk_at_once(tmp_path):
    with logger(tmp_path) as log:
        log.log(1, {"policy/loss": 1.0})
        assert read_metrics(tmp_path / "metrics.jsonl")[0]["policy/loss"] == 1.0


def test_resume_drops_later_rows_and_samples_and_goes_on(tmp_path):
    with logger(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, {"policy/loss": float(step)})
    append_samples(tmp_path / "samples.jsonl", [sample(2), sample(3)])
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "policy/lo')  # killed in the middle of a line
    before = read_metrics(tmp_path / "metrics.jsonl")[1]["run/elapsed_s"]
    with logger(tmp_path, start=2) as log:
        log.log(3, {"policy/loss": 33.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["policy/loss"]) for r in rows] == [(1, 1.0), (2, 2.0), (3, 33.0)]
    assert rows[2]["run/elapsed_s"] >= before
    assert [s.step for s in read_samples(tmp_path / "samples.jsonl")] == [2]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("policy/loss")] == [(1, 1.0), (2, 2.0), (3, 33.0)]


def test_a_torn_line_after_the_last_checkpoint_does_not_swallow_the_next_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    with logger(tmp_path, start=2) as log:
        log.log(3, {})
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_new_run_starts_with_empty_files(tmp_path):
    for _ in range(2):
        with logger(tmp_path) as log:
            log.log(0, {"eval/loss": 1.0})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    with logger(tmp_path / "none", rank=1) as log:
        with log.phase("rollout"):
            log.progress(5, 1, 2)
        log.log(1, {"policy/loss": 1.0})
        log.message("m")
        log.warn("w")
    assert not (tmp_path / "none").exists()
    assert capsys.readouterr() == ("", "")


def test_run_json_holds_stage_and_settings(tmp_path):
    logger(tmp_path, config={"beta1": 0.05, "adam_betas": (0.9, 0.95)}).close()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run == {"stage": "RTO", "total_steps": 4, "config": {"beta1": 0.05, "adam_betas": [0.9, 0.95]}}


def test_no_file_and_no_wandb_run_gets_a_urls_credentials(tmp_path, monkeypatch):
    seen = []

    class Wandb:
        @staticmethod
        def init(**settings):
            seen.append((settings["config"], list(sys.argv)))
            return SimpleNamespace(finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(sys, "argv", ["rto.py", "--reward-url=http://u:secret@h/rm?secret"])
    config = {"reward_url": ("http://u:secret@h/rm?secret",), "vllm_url": ("http://secret@h:1",)}
    RunLogger(tmp_path, stage="RTO", total_steps=1, rank=0, wandb_project="p", config=config).close()
    shown = {"reward_url": ("http://h/rm",), "vllm_url": ("http://h:1",)}
    assert seen == [(shown, ["rto.py", "--reward-url=http://h/rm"])]
    assert sys.argv[1] == "--reward-url=http://u:secret@h/rm?secret"
    assert "secret" not in (tmp_path / "run.json").read_text()


def test_wandb_that_is_not_installed_is_refused_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for rank in (0, 1):
        with pytest.raises(ConfigError, match="wandb_project: wandb is not installed"):
            RunLogger(tmp_path, stage="RTO", total_steps=1, rank=rank, wandb_project="x", config={})


def test_wandb_gets_the_rows_and_keeps_its_run_on_resume(tmp_path, monkeypatch):
    class Run:
        def __init__(self):
            self.rows, self.done = [], False

        def log(self, row, step):
            self.rows.append((step, row))

        def finish(self):
            self.done = True

    runs, ids = [], []

    class Wandb:
        @staticmethod
        def init(**settings):
            ids.append(settings["id"])
            runs.append(Run())
            return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for start in (0, 1):
        log = RunLogger(tmp_path, stage="RTO", total_steps=2, rank=0, wandb_project="p", config={}, start_step=start)
        log.log(start + 1, {"policy/loss": 0.5})
        log.close()
    assert ids[0] == ids[1]
    assert [(r.rows[0][0], r.rows[0][1]["policy/loss"], r.done) for r in runs] == [
        (1, 0.5, True),
        (2, 0.5, True),
    ]


def test_plain_console_shows_key_columns_and_nothing_that_moves(tmp_path, capsys):
    figures = {"reward/score": 0.5, "kl/response": 1.25, "response/length": 20.5, "policy/loss": -0.01}
    with logger(tmp_path, stage="RTO") as log:
        for step in (1, 2):
            with log.phase("rollout"):
                time.sleep(0.01)
                log.progress(1000, 1, 1)
            log.log(step, {**figures, "policy/clip_fraction": 0.1})
        log.warn("[b]careful[/b]")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    start, head, first, second, warning = out.splitlines()
    assert start.startswith("RTO: 4 steps, from the start")
    for name in ("step", "reward", "KL, nats", "length", "policy loss", "tokens/s", "time left"):
        assert name in head
    assert "clip_fraction" not in head  # in the files
    assert first.split()[:5] == ["1/4", "0.500", "1.250", "20.5", "-0.0100"]
    assert len(head) == len(first) == len(second)
    assert warning == "warning: [b]careful[/b]"


def test_console_rows_are_thinned_by_log_every_and_evaluations_get_their_line(tmp_path, capsys):
    with logger(tmp_path, total=7, config={"log_every": 3}, stage="SFT") as log:
        for step in range(1, 8):
            log.log(step, {"train/loss": 1.0 / step})
        log.log(7, {"eval/loss": 0.5})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["1/7", "3/7", "6/7", "7/7"]
    assert lines[6].split()[1:] == ["evaluation:", "loss", "0.5000"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 8


def test_long_phases_print_progress_lines_without_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_PROGRESS_S", 0.0)
    with logger(tmp_path) as log, log.phase("rollout"):
        log.progress(500, 3, 8)
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("  rollout: 3/8 · ")
    assert line.endswith("tokens/s")


def test_live_display_shows_run_and_phase():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, highlight=False)
    display = LiveDisplay(console, "RTO", 3, 60)
    display.enter("rollout")
    display.update(128, 512, "128/512 · 1,234 tokens/s")
    display.step(4, "step 4/60 · 12m 05s left")
    time.sleep(0.6)  # it draws four times a second
    display.leave()
    display.close()
    display.close()
    shown = out.getvalue()
    for text in ("RTO", "rollout", "128/512 · 1,234 tokens/s", "step 4/60 · 12m 05s left"):
        assert text in shown


def test_a_real_terminal_gets_the_live_display_and_the_rows(tmp_path):
    code = (
        "import sys; from rto_fast.logs.run_logger import RunLogger\n"
        "with RunLogger(sys.argv[1], stage='RTO', total_steps=2, rank=0, config={}) as log:\n"
        "    with log.phase('rollout'):\n"
        "        log.progress(10, 1, 2)\n"
        "    log.log(1, {'reward/score': 0.125})\n"
    )
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
    shown = bytearray()

    def drain():
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the other end is closed
                return
            if not chunk:
                return
            shown.extend(chunk)

    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=theirs, stderr=theirs, stdin=theirs, env=env
    ) as process:
        os.close(theirs)
        reader = threading.Thread(target=drain, daemon=True)
        reader.start()
        assert process.wait(timeout=60) == 0
        reader.join(timeout=10)
    os.close(ours)
    text = shown.decode()
    assert "rollout" in text
    assert "1/2" in text
    assert "0.125" in text
    assert "\x1b[?25l" in text  # the live display hides the cursor ...
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # ... and gives it back


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (187, "3m 07s"), (18720, "5h 12m")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_readers_forgive_a_torn_end_only(tmp_path):
    path = tmp_path / "m.jsonl"
    assert read_rows(path) == []
    path.write_bytes('{"step": 1}\n\n{"step": 2, "x": "é'.encode()[:-1])  # half a character
    assert read_rows(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2}')  # whole, only its newline is missing
    assert [r["step"] for r in read_rows(path)] == [1, 2]
    path.write_text('{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 1: not JSON"):
        read_rows(path)
    path.write_text("[1]\n{}\n")
    with pytest.raises(ValueError, match="line 1: expected a JSON object, got list"):
        read_rows(path)


def test_samples_round_trip_with_nan_and_after_a_torn_end(tmp_path):
    path = tmp_path / "deep" / "samples.jsonl"
    one = sample(1, ("a", "\n<b>é"), score=math.nan, extra={"x": 1.5}, label="PPO")
    append_samples(path, [one])
    with path.open("a") as f:
        f.write('{"prompt": "torn')
    append_samples(path, [sample(2, ())])
    first, second = read_samples(path)
    assert math.isnan(first.score)
    assert (first.tokens, first.extra, first.label) == (one.tokens, one.extra, one.label)
    assert second == sample(2, ())
    path.write_text('{"prompt": "p"}\n')
    with pytest.raises(ValueError, match=r"samples\.jsonl, row 1: not a sampled response"):
        read_samples(path)


def test_a_sample_of_unequal_lengths_is_refused():
    with pytest.raises(ValueError, match="kl: 1 values for 2 tokens"):
        sample(kl=[0.0])


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "x.html"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.html"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_drop_after_rewrites_only_when_it_must(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 5}\n')
    before = path.stat().st_mtime_ns
    assert len(drop_after(path, 5)) == 2
    assert path.stat().st_mtime_ns == before
    assert drop_after(path, 4) == [{"step": 1}]
    assert path.read_text() == '{"step": 1}\n'


def test_token_texts_keep_spaces_newlines_and_special_names():
    class SentencePiece:
        all_special_ids = (2,)
        pieces = ("▁the", "ing", "</s>", "<0x0A>", "<0xF0>", None)

        def convert_ids_to_tokens(self, ids):
            return [self.pieces[i] for i in ids]

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens).replace("▁", " ").strip()

    assert token_texts(SentencePiece(), range(6)) == [" the", "ing", "</s>", "\n", "<0xF0>", "<5>"]


@pytest.mark.parametrize("whiten", [(0.0, 1.0), (2.5, 0.5)])
def test_moments_of_the_advantages_are_their_own(whiten):
    """Of estimators that are not whitened, mean 0 and deviation 1, too."""
    import torch

    from rto_fast.contract import Targets
    from rto_fast.metrics import of_targets

    zeros = torch.zeros(4)
    advantages = torch.tensor([1.0, 3.0, 3.0, 7.0])
    moments = tuple(torch.tensor(x, dtype=torch.float64) for x in whiten)
    found = of_targets(Targets(zeros, zeros, zeros, zeros, advantages, zeros, moments), 2, 0.01)
    assert found["advantage/mean"] == 3.5
    assert found["advantage/std"] == pytest.approx(float(advantages.std(correction=0)))
