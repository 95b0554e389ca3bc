"""SFT, reward model and DPO train adapters: what they write, keep and go on from."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from launches import Launch
from loop_helpers import ROOT, make_tiny_models
from safetensors.torch import load_file

from rto_fast import export
from rto_fast.config import DPOConfig, RMConfig, SFTConfig
from rto_fast.generate import GenerateConfig, generate
from rto_fast.models.attention import PACKED
from rto_fast.models.load import load_policy
from rto_fast.supervised import dpo, sft
from rto_fast.supervised.dpo import train_dpo
from rto_fast.supervised.reward_model import train_rm
from rto_fast.supervised.sft import train_sft

pytest.importorskip("peft")
WORKER = ROOT / "tests" / "adapter_worker.py"
RANKS = (1, 2)
LOADING = {"dtype": torch.float32, "attention": PACKED, "argument": "model"}
CASES = [
    (name, kind, stage, "plain") for name in ("untied", "tied") for kind in ("policy", "scalar") for stage in (2, 3)
]
CASES += [("untied", "policy", stage, "dora") for stage in (2, 3)]


def settings(tiny, output: Path, **more) -> dict:
    base = {
        "model": tiny.policy, "data": tiny.pairs, "output_dir": str(output), "dtype": "fp32", "batch": 8,
        "max_length": 64, "data_cache": False, "data_workers": 1, "gradient_checkpointing": False, "lora_rank": 4,
        "lora_lr": 1e-2,
    }  # fmt: skip
    return base | more


@pytest.fixture(scope="module")
def seen(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tied = make_tiny_models(folder / "tied", rows=8, tied=True)
    bases = json.dumps({"untied": tiny.policy, "tied": tied.policy})
    found = {}
    for ranks in RANKS:
        done = Launch([WORKER, bases, folder], ranks=ranks, log=folder / f"log{ranks}").wait()
        assert done.returncode == 0, done.output
        found[ranks] = torch.load(folder / f"found-{ranks}.pt")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_engines_compute_what_the_merged_model_does(seen, ranks, case):
    """Trained by ZeRO, on packed rows; what would be pushed to a sampler is the merged model too."""
    found = seen[ranks][case]
    assert (found["ours"] - found["first"]).abs().max() > 0.05, "the updates moved nothing"
    torch.testing.assert_close(found["ours"], found["merged"], rtol=1e-6, atol=1e-5)  # down to -20 nats: 10 ulp
    for name, tensor in found["pushed"].items():
        torch.testing.assert_close(tensor, found["weights"][name], rtol=0, atol=1e-6)
    assert (found["ours"] - seen[1][case]["ours"]).abs().max() < 1e-3


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_sft_resumes_bit_for_bit(tiny, tmp_path, one_rank, zero_stage):
    """Dropout included. A checkpoint holds no base: it is smaller than the base's weights with AdamW's states."""
    config = settings(tiny, tmp_path / "whole", data=tiny.texts, zero_stage=zero_stage, save_every=2, keep_last=9,
                      lora_dropout=0.1, resume="auto", lora_targets=("q_proj",))  # fmt: skip
    whole = train_sft(SFTConfig(**config))
    steps = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert len(steps) > 2
    folder = tmp_path / "again" / "checkpoints"
    shutil.copytree(steps[0], folder / steps[0].name)
    again = train_sft(SFTConfig(**config | {"output_dir": str(tmp_path / "again")}))
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (again, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(t.abs().max() > 0 for name, t in ours.items() if "lora_B" in name)
    size = (Path(tiny.policy) / "model.safetensors").stat().st_size
    assert sum(p.stat().st_size for p in steps[0].rglob("*.pt")) < size


def test_a_checkpoint_knows_its_base(tiny, tmp_path, one_rank):
    """It is not in the checkpoint; a resumed run refuses another."""
    from rto_fast.errors import ConfigError

    base = tmp_path / "base"
    shutil.copytree(tiny.policy, base)
    first = train_sft(SFTConfig(**settings(tiny, tmp_path / "sft", data=tiny.texts, model=str(base))))
    config = settings(tiny, tmp_path / "dpo", model=str(first), save_every=2, resume="auto")
    train_dpo(DPOConfig(**config))
    with (base / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match=r"resume: model: '.*base', the base of '.*sft.*': config.json has other"):
        train_dpo(DPOConfig(**config))


def test_stages_hand_adapters_on(tiny, tmp_path, one_rank):
    """SFT, reward model and DPO on one another's folders; export and generate take them."""
    first = train_sft(SFTConfig(**settings(tiny, tmp_path / "sft", data=tiny.texts)))
    second = train_dpo(DPOConfig(**settings(tiny, tmp_path / "dpo", model=str(first))))
    third = train_rm(RMConfig(**settings(tiny, tmp_path / "rm", model=str(first))))
    fourth = train_rm(RMConfig(**settings(tiny, tmp_path / "rm2", model=str(third))))
    for folder in (first, second, third, fourth):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(Path(tiny.policy).resolve())
        assert not (folder / "config.json").exists()
        assert (folder / "adapter_model.safetensors").stat().st_size < 40_000
    assert json.loads((third / "rto_adapter.json").read_text())["std"] != 1.0
    merged = tmp_path / "merged"
    assert export.export_checkpoint(export.ExportConfig(run=str(second), to=str(merged), merge=True)) == [merged]
    whole, part = (load_policy(str(f), **LOADING).inner.state_dict() for f in (merged, second))
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    assert (merged / "rto_template.json").read_text() == (second / "rto_template.json").read_text()
    asked = {"data": tiny.texts, "dtype": "fp32", "max_response_length": 8, "max_rows": 6, "greedy": True,
             "generator": "x", "rollout_engine": "transformers", "prompt_key": "prompt"}  # fmt: skip
    texts = [
        generate(GenerateConfig(model=str(folder), output=str(tmp_path / f"{i}.jsonl"), token_logprobs=True, **asked))
        for i, folder in enumerate((second, merged, tiny.policy))
    ]
    ours, theirs, base = ([json.loads(line) for line in p.read_text().splitlines()] for p in texts)
    assert [r["token_ids"] for r in ours] == [r["token_ids"] for r in theirs]
    assert [r["token_ids"] for r in ours] != [r["token_ids"] for r in base]
    # The reference is the model's own base, which the guided engine must not take for the model.
    for search in ({"beams": 2, "greedy": False}, {"guide_model": str(second), "guide_scale": 2.0}):
        for i, (model, guide) in enumerate(((second, second), (merged, merged))):
            guided = search | ({"guide_model": str(guide), "guide_ref": tiny.policy} if "guide_scale" in search else {})
            generate(GenerateConfig(model=str(model), output=str(tmp_path / f"s{i}.jsonl"), token_logprobs=True,
                                    **asked | guided))  # fmt: skip
        ours, theirs = ((tmp_path / f"s{i}.jsonl").read_text() for i in range(2))
        (tmp_path / "s0.jsonl").unlink(), (tmp_path / "s1.jsonl").unlink()
        assert json.loads(ours.splitlines()[0])["token_ids"]
        assert [json.loads(r)["logprobs"] for r in ours.splitlines()] == [
            pytest.approx(json.loads(r)["logprobs"], abs=1e-5) for r in theirs.splitlines()
        ]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_checkpoint_is_exported_as_an_adapter_or_whole(tiny, tmp_path, one_rank, zero_stage):
    config = SFTConfig(**settings(tiny, tmp_path / "run", data=tiny.texts, save_every=1, zero_stage=zero_stage))
    own = load_file(train_sft(config) / "adapter_model.safetensors")
    for merge in (False, True):
        asked = export.ExportConfig(run=str(tmp_path / "run"), to=str(tmp_path / f"out{merge}"), merge=merge)
        (folder,) = export.export_checkpoint(asked)
        assert (folder / "adapter_config.json").exists() != merge
        if not merge:
            theirs = load_file(folder / "adapter_model.safetensors")
            assert theirs.keys() == own.keys()
            assert all(torch.equal(theirs[name], own[name]) for name in own)
    whole, part = (load_policy(str(f), **LOADING).inner.state_dict() for f in (folder, tmp_path / "run" / "model"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize(("objective", "zero"), [("dpo", 2), ("kto", 2), ("tdpo1", 2), ("dpo", 3), ("kto", 3)])
def test_the_reference_is_the_model_before_training(tiny, tmp_path, one_rank, monkeypatch, objective, zero, goes_on):
    """On the same base in memory, loaded once; the first step's loss says that the two are one, exactly."""
    start = tiny.policy
    if goes_on:
        start = str(train_sft(SFTConfig(**settings(tiny, tmp_path / "sft", data=tiny.texts))))
    loaded = []

    def counted(*args, **kwargs):
        loaded.append(load_policy(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(dpo, "load_policy", counted)
    train_dpo(DPOConfig(**settings(tiny, tmp_path / "out", model=start, objective=objective, zero_stage=zero)))
    assert len(loaded) == 1
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    wanted = 0.5 if objective == "kto" else math.log(2)
    assert first["train/loss"] == pytest.approx(wanted, abs=1e-6)
    assert first.get("train/margin", 0.0) == pytest.approx(0.0, abs=1e-7)


def test_rates_of_adapters_are_ten_times_those_of_weights():
    for kind in (SFTConfig, RMConfig, DPOConfig):
        config = kind()
        assert config.peak_lr == config.lr
        adapted = dataclasses.replace(config, lora_rank=8)
        assert adapted.peak_lr == pytest.approx(10 * config.lr)


def test_dropout_drops_in_training_alone(tiny, tmp_path, one_rank, monkeypatch):
    """The evaluation is that of a model without dropout."""
    made = []
    monkeypatch.setattr(sft, "run_stage", lambda config, common, stage: made.append(stage))
    train_sft(SFTConfig(**settings(tiny, tmp_path, data=tiny.texts, lora_dropout=0.5)))
    model = made[0].model
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    assert layers
    assert {m.p for m in layers} == {0.5}
