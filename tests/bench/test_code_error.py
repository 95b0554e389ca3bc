"""The bench of codes' errors: rows hold what the loop measures at its start, of a DPO model that is trained once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loop_helpers import stand_in_code

from bench import code_error
from rto_fast.errors import ConfigError
from rto_fast.models.quantised import CODES

pytest.importorskip("peft")
pytestmark = pytest.mark.slow


def test_a_row_has_the_loops_figures(tiny, tmp_path, monkeypatch, one_rank):
    monkeypatch.setitem(CODES, "int8", stand_in_code(torch.bfloat16))
    for settings, data in ((code_error.TRAINING, tiny.pairs), (code_error.LOOP, tiny.prompts)):
        monkeypatch.setitem(settings, "data", data)
    monkeypatch.setitem(code_error.TRAINING, "model", tiny.policy)
    monkeypatch.setitem(code_error.TRAINING, "max_length", 64)
    monkeypatch.setitem(code_error.LOOP, "policy", tiny.policy)
    plain, built, trained = code_error.build.build, [], []
    monkeypatch.setattr(code_error.build, "build", lambda config: built.append(plain(config)) or built[-1])
    train = code_error.train_dpo
    monkeypatch.setattr(code_error, "train_dpo", lambda config: trained.append(config.output_dir) or train(config))
    for name in ("frozen models, int8", "base of adapters, int8", "frozen models, int8"):
        row = code_error.measure(code_error.CodeErrorConfig(runs=tmp_path, rows=64), name)
        error = built[-1].frozen_error
        assert row[0] == name
        assert len(row) == 1 + len(code_error.FIGURES)
        assert float(row[3]) == pytest.approx(error["frozen/token_reward_error_mean"], rel=0.1)
        assert float(row[6]) == pytest.approx(error["frozen/ref_logp_error_max"], rel=0.1)
        assert 0 < float(row[3]) < float(row[4])
    assert [Path(folder).name for folder in trained] == ["dpo-whole", "dpo-adapter"]


def test_models_of_other_pairs_are_refused_before_anything_is_trained(tmp_path, monkeypatch, one_rank):
    """A table of 640 pairs' models would be shown as that of all."""
    monkeypatch.setattr(code_error, "MODEL", tmp_path)
    monkeypatch.setattr(code_error, "PAIRS", tmp_path / "pairs.jsonl")
    (tmp_path / "pairs.jsonl").touch()
    monkeypatch.setattr(code_error, "check_code", lambda kind: None)
    measured = []
    monkeypatch.setattr(code_error, "measure", lambda config, name: measured.append(config.rows) or [name] * 7)
    runs = tmp_path / "runs"
    for _ in range(2):
        code_error.main(code_error.CodeErrorConfig(runs=runs, rows=64))
    with pytest.raises(ConfigError, match=r"holds DPO models of other sizes: rows=64 \(now 0\); use another --runs"):
        code_error.main(code_error.CodeErrorConfig(runs=runs, rows=0))
    with pytest.raises(ConfigError, match="rows: must not be negative, got -1"):
        code_error.main(code_error.CodeErrorConfig(runs=runs, rows=-1))
    assert measured == [64] * 2 * len(code_error.HELD)
