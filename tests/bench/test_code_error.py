"""The bench of codes' errors: rows hold what the loop measures at its start, of a DPO model that is trained once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loop_helpers import stand_in_code

from bench import code_error
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
