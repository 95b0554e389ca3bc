"""DPO, reward model and RTO with adapters on a base in codes: what is shared, pushed, said, kept and exported."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from loop_helpers import ROOT, small_run, stand_in_code
from safetensors.torch import load_file

from rto_fast import export, trainer
from rto_fast import run as run_module
from rto_fast.config import DPOConfig, RMConfig, RTOConfig
from rto_fast.logs.run_logger import RunLogger
from rto_fast.models.attention import PACKED
from rto_fast.models.load import load_policy
from rto_fast.models.packing import PackedBatch
from rto_fast.models.quantised import CODES, coded
from rto_fast.supervised.dpo import train_dpo
from rto_fast.supervised.reward_model import train_rm

pytest.importorskip("peft")
pytestmark = pytest.mark.slow
KIND = "int8"
LOADING = {"dtype": torch.float32, "attention": PACKED, "argument": "model"}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory, one_rank):
    """Folders of a DPO model, a reward model and an RTO run; its Run, its log, and the responses of its first figures.

    In bitsandbytes' int8, or where it is not installed in a stand-in.
    """
    root, found = tmp_path_factory.mktemp("coded"), {}
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("bitsandbytes") is None:
            patch.setitem(CODES, KIND, stand_in_code(torch.bfloat16))
        common = {
            "model": tiny.policy, "data": tiny.pairs, "dtype": "fp32", "batch": 32, "max_length": 64,
            "data_cache": False, "data_workers": 1, "gradient_checkpointing": False, "lora_rank": 4, "lora_lr": 1e-2,
            "lora_base_dtype": KIND,
        }  # fmt: skip
        found["dpo"] = train_dpo(DPOConfig(**common, output_dir=str(root / "dpo")))
        found["rm"] = train_rm(RMConfig(**common, output_dir=str(root / "rm")))
        plain, seen = run_module.frozen_error, []
        patch.setattr(run_module, "frozen_error", lambda rollout, *a: seen.append(rollout) or plain(rollout, *a))
        said: list[str] = []
        message = RunLogger.message
        patch.setattr(RunLogger, "message", lambda log, text: said.append(text) or message(log, text))
        found["run"] = trainer.train(RTOConfig(**small_run(
            tiny, root / "rto", dpo_model=str(found["dpo"]), reward_model=(str(found["rm"]),), lora_rank=4,
            lora_policy_lr=1e-2, lora_base_dtype=KIND, rollout_engine="transformers", save_every=1, keep_last=9,
        )))  # fmt: skip
        yield found | {"root": root, "said": said, "rollout": seen[0]}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_all_models_stand_on_one_base_in_codes(runs):
    run = runs["run"]
    models = [run.policy.model, run.critic.model, *(f.module for f in run.scorers.frozen)]
    codes = [{m.codes.data_ptr() for m in coded(model.inner).values()} for model in models]
    assert len(models) == 5
    assert len(codes[0]) == 14
    assert all(places == codes[0] for places in codes)


def test_the_sampler_is_the_policy_and_the_first_kl_is_zero(runs):
    """The decoded matrices with the adapter merged are pushed."""
    first, second = rows(runs["root"] / "rto")
    assert first["kl/response"] == 0.0
    assert second["kl/response"] != 0.0
    assert max(row["sampler/logp_diff_max"] for row in (first, second)) < 1e-4


@torch.no_grad()
def test_the_error_of_token_rewards_is_measured(tiny, runs):
    """Against models loaded whole, and those in codes, by this test."""
    rollout = runs["rollout"]
    batch = PackedBatch.make(rollout.sequences(), rollout.prompt_lens.tolist(), torch.device("cpu"), "sdpa")
    reward = {}
    for kind in ("whole", KIND):
        models = []
        for path in (str(runs["dpo"]), tiny.policy):
            model = load_policy(path, **LOADING)
            if kind == KIND:
                given = load_file(runs["dpo"] / "adapter_model.safetensors")
                for name, module in coded(runs["run"].policy.model.inner).items():
                    weight = module.decoded(torch.float32)
                    if path != tiny.policy:
                        a, b = (given[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
                        weight = weight + 32 / 4 * b @ a
                    model.inner.get_submodule(name).weight.data = weight
            models.append(model)
        reward[kind] = models[0](batch) - models[1](batch)
    gap = (reward[KIND] - reward["whole"]).abs()
    first = rows(runs["root"] / "rto")[0]
    assert first["frozen/token_reward_error_mean"] == pytest.approx(float(gap.mean()), rel=1e-2)
    assert first["frozen/token_reward_error_max"] == pytest.approx(float(gap.max()), rel=1e-2)
    assert first["frozen/score_error_max"] > 0
    (line,) = [text for text in runs["said"] if text.startswith("frozen models in")]
    assert line.startswith(f"frozen models in {KIND} against fp32, 8 responses: token rewards by ")


def test_two_ranks_do_what_one_does(runs, tmp_path, launch):
    """The first iteration, in bitsandbytes' int8."""
    pytest.importorskip("bitsandbytes")
    settings = dataclasses.asdict(runs["run"].config) | {
        "output_dir": str(tmp_path / "run"), "iterations": 1, "save_every": 0, "report_samples": 0,
    }  # fmt: skip
    result = launch([ROOT / "tests" / "vllm_worker.py", json.dumps([settings])], ranks=2)
    assert result.returncode == 0, result.output
    (ours,), alone = rows(tmp_path / "run"), rows(runs["root"] / "rto")[0]
    learnt = [k for k in alone if k.startswith(("policy/", "critic/", "kl/", "reward/", "frozen/"))]
    assert len(learnt) > 10
    for name in learnt:
        assert ours[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-5), name


def test_a_checkpoint_has_no_base_and_an_export_merges_into_the_whole_one(tiny, runs, capsys):
    """Which the export says."""
    root = runs["root"]
    weights = (Path(tiny.policy) / "model.safetensors").stat().st_size
    (step, *_) = sorted((root / "rto" / "checkpoints").iterdir())
    assert sum(p.stat().st_size for p in (step / "policy").rglob("*.pt")) < weights
    base = load_file(Path(tiny.policy) / "model.safetensors")
    asked = {"dpo": (str(runs["dpo"]), root / "dpo-whole"), "rto": (str(root / "rto"), root / "rto-whole")}
    for name, (run, to) in asked.items():
        folder = export.export_checkpoint(export.ExportConfig(run=run, to=str(to), merge=True))[-1]
        said = capsys.readouterr().out
        assert f"trained on {Path(tiny.policy).resolve()} in {KIND}, merged into its whole weights" in said, name
        whole = load_file(folder / "model.safetensors")
        given = load_file((runs["dpo"] if name == "dpo" else root / "rto" / "policy") / "adapter_model.safetensors")
        for key in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            a, b = (given[f"base_model.model.{key}.lora_{x}.weight"] for x in "AB")
            assert b.abs().max() > 0
            torch.testing.assert_close(whole[f"{key}.weight"], base[f"{key}.weight"] + 8 * b @ a, rtol=0, atol=1e-6)
