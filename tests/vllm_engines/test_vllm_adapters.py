"""Adapters in a colocated vLLM's LoRA: what arrives, what it does, and runs that push nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from engine_helpers import CPU, HEADS, ROUNDING, rows
from loop_helpers import ROOT, make_tiny_models, small_run, stand_in_code
from rollout_helpers import quiet, reference_logp, requests_of
from transformers import AutoModelForCausalLM

from rto_fast import trainer
from rto_fast.config import RTOConfig, SFTConfig
from rto_fast.config.lora import Lora
from rto_fast.errors import SyncError
from rto_fast.models.adapters import form_of
from rto_fast.models.attention import PACKED
from rto_fast.models.load import load_policy
from rto_fast.models.quantised import CODES
from rto_fast.models.save import adapter_weights, whole_weights
from rto_fast.rollout.engine import GREEDY, Sampling
from rto_fast.rollout.transformers_engine import TransformersEngine
from rto_fast.rollout.vllm_engines import load_adapter
from rto_fast.rollout.vllm_engines.colocated import VLLMEngine
from rto_fast.rollout.vllm_engines.support import installed
from rto_fast.supervised.sft import train_sft

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not installed(), reason="vLLM is not installed (make install-vllm)"),
]
SAMPLING, REQUESTS = Sampling(16, 0.7, (2,)), requests_of(12, 80)
ADAPTED = {"lora_rank": 3, "lora_policy_lr": 0.01, "vllm_max_sequences": 16, "beta1": 0.05}
LEFT = (0.0, ("all-linear",), False, False, 0)
"""Of a Lora behind rank and alpha."""
STORIES, PAIRS = (ROOT.parent / "shared" / p for p in ("models/stories1m", "data/story_preferences.jsonl"))
LAST = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_models(tmp_path_factory.mktemp("adapted"), tied=True, **HEADS)


def adapted(path: str, seed: int = 1, **settings):
    """A policy with an adapter that moves its log-probs by a tenth of a nat or more."""
    lora = dataclasses.replace(Lora(3, 32, *LEFT), **settings)
    model = load_policy(path, dtype=torch.float32, attention=PACKED, argument="policy", lora=lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    return model


def colocated(path: str, form) -> VLLMEngine:
    return VLLMEngine(path, CPU, torch.float32, max_length=64, max_sequences=64, adapter=form)


@pytest.fixture(scope="module")
def engine(tiny, one_rank):
    """vLLM in this process, for adapters."""
    made = colocated(tiny.policy, form_of(adapted(tiny.policy)))
    yield made
    made.close()


def answers(engine):
    return engine.generate(REQUESTS, SAMPLING, quiet)


def merged_into(model, path: str, folder: Path) -> Path:
    """A folder of the base at `path` with the adapter merged by PEFT."""
    whole = AutoModelForCausalLM.from_pretrained(path)
    whole.load_state_dict({name: tensor.clone() for name, tensor in whole_weights(model)}, strict=False)
    whole.save_pretrained(folder)
    return folder


def test_each_push_moves_the_log_probs_and_the_old_one_brings_them_back(engine, tiny, tmp_path):
    """Only the adapter's numbers travel; sampling is by base and adapter, after a sleep too."""
    if engine.version == 0:
        with pytest.raises(SyncError, match="pushed yet"):
            answers(engine)
    one, two, seen = adapted(tiny.policy), adapted(tiny.policy, seed=2), []
    for version, model in enumerate((one, two, one), start=1):
        stats = engine.push(adapter_weights(model), version)
        sent = dict(adapter_weights(model))
        assert stats.digests.keys() == sent.keys()
        assert stats.bytes == sum(4 * tensor.numel() for tensor in sent.values())
        engine.wake()
        seen.append(answers(engine))
        truth = reference_logp(merged_into(model, tiny.policy, tmp_path / str(version)), seen[-1], 0.7)
        torch.testing.assert_close(seen[-1].sampler_logp.double(), truth, atol=ROUNDING, rtol=0)
        assert (reference_logp(tiny.policy, seen[-1], 0.7) - truth).abs().max() > 0.1
        engine.sleep()
    engine.wake()
    again = answers(engine)
    assert [r.version for r in (*seen, again)] == [1, 2, 3, 3]
    assert not torch.equal(seen[0].tokens, seen[1].tokens)
    for rollout in (seen[2], again):
        assert torch.equal(rollout.tokens, seen[0].tokens)
        assert torch.equal(rollout.sampler_logp, seen[0].sampler_logp)


def test_a_push_that_is_not_the_adapter_is_refused(engine, tiny):
    model = adapted(tiny.policy)
    for change, message in (
        (lambda w: w.pop(LAST), r"never taken \(1 of 28"),
        (lambda w: w.update(extra=torch.zeros(2)), "extra: pushed, but"),
        (lambda w: w.update({LAST: torch.zeros(3)}), r"up_proj.*pushed with shape \[3\]"),
    ):
        weights = {name: tensor.clone() for name, tensor in adapter_weights(model)}
        change(weights)
        with pytest.raises(SyncError, match=message):
            engine.push(weights.items(), 7)
        with pytest.raises(SyncError, match="incomplete"):
            answers(engine)
    engine.push(adapter_weights(model), 8)
    engine.wake()
    assert answers(engine).version == 8


@pytest.mark.parametrize("lack", ["DoRA", "base in int8 as the policy's is"])
def test_what_vllms_lora_has_not_is_pushed_merged(tiny, one_rank, tmp_path, monkeypatch, lack):
    monkeypatch.setitem(CODES, "int8", stand_in_code(torch.bfloat16))
    model = adapted(tiny.policy, **{"dora": True} if lack == "DoRA" else {"base_dtype": "int8"})
    engine = colocated(tiny.policy, form_of(model))
    assert not engine.takes_adapter
    assert engine.merged_because == f"vLLM's LoRA has no {lack}"
    engine.push(whole_weights(model), 1)
    rollout = answers(engine)
    truth = reference_logp(merged_into(model, tiny.policy, tmp_path), rollout, 0.7)
    torch.testing.assert_close(rollout.sampler_logp.double(), truth, atol=ROUNDING, rtol=0)
    engine.close()


def test_ours_and_peft_and_vllm_write_the_same_text(tiny, one_rank, tmp_path):
    """Greedily, by an adapter that SFT has trained and written: pushed by us to both engines, or read by the others."""
    from peft import PeftModel
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    base, data = (str(STORIES), str(PAIRS)) if STORIES.is_dir() else (tiny.policy, tiny.pairs)
    written = str(train_sft(SFTConfig(
        model=base, data=data, output_dir=str(tmp_path), dtype="fp32", batch=16, max_rows=32, max_length=384,
        data_cache=False, data_workers=1, gradient_checkpointing=False, lora_rank=4, lora_lr=1e-2,
    )))  # fmt: skip
    model = load_policy(written, dtype=torch.float32, attention=PACKED, argument="policy", lora=Lora(4, 32, *LEFT))
    requests, greedy = requests_of(6, 200 if STORIES.is_dir() else 80), Sampling(24, GREEDY, ())
    plain = TransformersEngine(base, CPU, torch.float32, 0)
    before = plain.generate(requests, greedy, quiet).responses()
    plain.push(whole_weights(model), 1)
    ours = [r.tolist() for r in plain.generate(requests, greedy, quiet).responses()]
    assert sum(a.tolist() != b for a, b in zip(before, ours, strict=True)) >= 3  # the adapter does something
    engine = colocated(base, form_of(model))
    engine.push(adapter_weights(model), 1)
    assert [r.tolist() for r in engine.generate(requests, greedy, quiet).responses()] == ours
    how = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": list(q.prompt)} for q in requests]
    theirs = engine.llm.generate(prompts, how, lora_request=LoRARequest("saved", 2, written), use_tqdm=False)
    assert [list(one.outputs[0].token_ids) for one in theirs] == ours
    engine.close()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), written)
    adapted.generation_config.eos_token_id = None
    for request, response in zip(requests, ours, strict=True):
        ids = torch.tensor([request.prompt])
        out = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        assert out[0, ids.shape[1] :].tolist() == response


# Whole runs


def adapter_bytes(folder: Path) -> int:
    from safetensors.torch import load_file

    return sum(tensor.nbytes for tensor in load_file(folder / "policy/adapter_model.safetensors").values())


def test_a_run_pushes_the_adapter_and_learns_what_it_learns_merged(tiny, tmp_path, one_rank, capsys):
    found = {}
    for push in ("adapter", "merged"):
        trainer.train(RTOConfig(**small_run(tiny, tmp_path / push, **ADAPTED, rollout_engine="vllm", lora_push=push)))
        found[push], said = rows(tmp_path / push), " ".join(capsys.readouterr().out.split())
        assert re.search(r"sampler agrees with the policy: .*\((the adapter|all weights) moved and pushed", said)
        assert ("the adapter alone is pushed, to vLLM's own LoRA" in said) == (push == "adapter")
        assert all(row["sampler/logp_diff_max"] < ROUNDING for row in found[push])
    whole = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(tiny.policy).parameters())
    assert {row["sync/bytes"] for row in found["adapter"]} == {adapter_bytes(tmp_path / "adapter")}
    assert {row["sync/bytes"] for row in found["merged"]} == {whole}
    assert found["adapter"][-1]["kl/response"] > 0.01
    for name in ("reward/score", "kl/response", "response/length"):
        assert found["adapter"][-1][name] == pytest.approx(found["merged"][-1][name], abs=1e-3), name


def test_ranks_that_share_an_engine_push_the_adapter(tiny, tmp_path, launch):
    """Each holds a part of every layer, under ZeRO-2 and 3, and samples the policy."""
    cases = {2: {"lora_rslora": True}, 3: {"lora_targets": ["q_proj", "down_proj"]}}
    runs = [
        small_run(tiny, tmp_path / str(zero), **ADAPTED, rollout_engine="vllm", zero_stage=zero,
                  vllm_tensor_parallel=2, report_samples=0, **more)
        for zero, more in cases.items()
    ]  # fmt: skip
    result = launch([ROOT / "tests" / "vllm_worker.py", json.dumps(runs)], ranks=2)
    assert result.returncode == 0, result.output
    assert result.output.count("the adapter alone is pushed, to vLLM's own LoRA") == len(runs)
    for settings in runs:
        log = rows(Path(settings["output_dir"]))
        assert all(row["sampler/logp_diff_max"] < ROUNDING for row in log), (settings, log)
        assert log[-1]["kl/response"] > 0.01, settings
        assert {row["sync/bytes"] for row in log} == {adapter_bytes(Path(settings["output_dir"]))}


def test_an_adapter_that_does_not_act_is_found_at_the_start(tiny, tmp_path, one_rank, monkeypatch):
    """All bytes arrive, vLLM's layers took them, and the base alone samples."""
    from rto_fast.rollout.vllm_engines import colocated

    monkeypatch.setattr(colocated, "request", lambda: None)
    with pytest.raises(SyncError, match="the sampler is not the policy: after a push of moved weights"):
        trainer.train(RTOConfig(**small_run(tiny, tmp_path, **ADAPTED, rollout_engine="vllm")))


def test_a_layer_that_takes_no_adapter_is_found(tiny, tmp_path, one_rank, monkeypatch):
    """vLLM leaves modules without a layer out and says nothing."""
    plain = load_adapter.Delivery.__init__

    def fewer(delivery, worker, *args):
        plain(delivery, worker, *args)
        layer = next(one for one in delivery.layers if "QKV" in type(one).__name__)
        layer.set_lora = lambda *args: None

    monkeypatch.setattr(load_adapter.Delivery, "__init__", fewer)
    with pytest.raises(SyncError, match=r"no layer of vLLM's took it; use --lora-push merged"):
        trainer.train(RTOConfig(**small_run(tiny, tmp_path, **ADAPTED, rollout_engine="vllm")))
