"""recipes/rto_lora.py by flags on a CPU: reward model, DPO and RTO with adapters, each from the last one's folder."""

from __future__ import annotations

import json

import pytest
from loop_helpers import small_run
from recipe_helpers import flags_of, run_recipe
from safetensors.torch import load_file

pytest.importorskip("peft")
pytestmark = pytest.mark.slow


def test_it_runs_on_a_cpu_by_flags(tiny, tmp_path, monkeypatch, capfd, one_rank):
    supervised = {
        "model": tiny.policy, "data": tiny.pairs, "data_split": "train", "eval_split": "", "dtype": "fp32", "batch": 32,
        "max_length": 64, "data_cache": False, "data_workers": 1, "lora_rank": 16, "max_rows": 32, "eval_fraction": 0,
    }  # fmt: skip
    for name in ("dpo", "rm"):
        flags = flags_of(supervised | {"output_dir": tmp_path / name})
        assert run_recipe(f"{name}_llama3.py", flags, monkeypatch) == 0, capfd.readouterr().err
    asked = small_run(tiny, tmp_path / "rto", dpo_model=tmp_path / "dpo/model", reward_model=tmp_path / "rm/model",
                      prompt_key="prompt", iterations=1)  # fmt: skip
    assert run_recipe("rto_lora.py", flags_of(asked), monkeypatch) == 0, capfd.readouterr().err
    said = capfd.readouterr().out
    assert "is held once for policy, critic, reference, dpo_model, reward_model" in said
    assert "of rank 16 on" in said
    (row,) = [json.loads(line) for line in (tmp_path / "rto/metrics.jsonl").read_text().splitlines()]
    assert row["kl/response"] == 0
    assert any(tensor.any() for name, tensor in load_file(tmp_path / "rto/policy/adapter_model.safetensors").items()
               if "lora_B" in name)  # fmt: skip
