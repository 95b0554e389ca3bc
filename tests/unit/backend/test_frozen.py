"""Frozen models: where their weights lie changes no bit of what they say."""

from __future__ import annotations

import dataclasses
import json
import weakref

import pytest
import torch
from launches import Launch
from loop_helpers import ROOT, save_llama, small_run

from rto_fast import build, trainer
from rto_fast.backend import frozen as frozen_module
from rto_fast.backend.frozen import FrozenModel, frozen, lent, partitions
from rto_fast.config import RTOConfig
from rto_fast.errors import ConfigError
from rto_fast.models.heads import backbone
from rto_fast.models.load import load_policy
from rto_fast.models.quantised import matrices
from rto_fast.scoring.score import score_rollout


@pytest.fixture(scope="module")
def seen(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("partition")
    target = folder / "scores.pt"
    paths = json.dumps(dataclasses.asdict(tiny))
    worker = ROOT / "tests" / "partition_worker.py"
    result = Launch([worker, paths, target], ranks=2, log=folder / "log").wait()
    assert result.returncode == 0, result.output
    return torch.load(target)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_partitioned_models_say_the_same_bits(seen, dtype):
    whole, spread = seen[dtype, "no"], seen[dtype, "yes"]
    for before, after in zip(whole, spread, strict=True):
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]), name
    first, second = (whole[i]["policy_logp" if "policy_logp" in whole[i] else "old_logp"] for i in (0, 1))
    assert not torch.equal(first, second), "the update moved nothing"


@pytest.mark.parametrize(
    ("ranks", "kind", "settings", "spread"),
    [
        (8, "cuda", {}, True),
        (1, "cuda", {}, False),
        (8, "cpu", {}, False),
        (8, "cuda", {"park_frozen": True}, False),
        (8, "cuda", {"partition_frozen": "no"}, False),
        (2, "cpu", {"partition_frozen": "yes"}, True),
        (1, "cpu", {"zero_stage": 3}, True),
    ],
)
def test_which_runs_partition(tiny, tmp_path, ranks, kind, settings, spread):
    config = RTOConfig(**small_run(tiny, tmp_path, **settings))
    config.validate()
    assert partitions(config, ranks, kind) == spread


def test_parked_and_partitioned_is_refused(tiny, tmp_path):
    config = RTOConfig(**small_run(tiny, tmp_path, park_frozen=True, partition_frozen="yes"))
    with pytest.raises(ConfigError, match=r"partition_frozen: .* park_frozen"):
        config.validate()


def test_parking_copies_nothing_back(monkeypatch):
    """Weights that never change stay in host memory: parking frees the device and moves no byte."""
    module = torch.nn.Linear(3, 2).eval().requires_grad_(False)
    before, host = module.weight.clone(), module.weight.data_ptr()
    model = FrozenModel(module, torch.device("cpu"), parks=True)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **settings: tensor.clone())  # another device
    model.fetch()
    assert module.weight.data_ptr() != host
    model.park()
    assert module.weight.data_ptr() == host
    assert torch.equal(module.weight, before)


def test_a_parked_model_keeps_its_ties_and_buffers(one_rank, tiny, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    module.register_buffer("scale", torch.ones(1))
    model = frozen(module, RTOConfig(**small_run(tiny, tmp_path)), parks=True)
    model.fetch()
    assert module[1].weight is module[0].weight
    assert len(model.host) == 2


def test_parked_models_come_to_the_device_one_at_a_time_and_once_a_rollout(one_rank, tiny, tmp_path, monkeypatch):
    """Their host copies are made once, at the start, and keep place and bits; results are those of whole models."""
    here: list[FrozenModel] = []
    fetched: list[FrozenModel] = []
    made: list[torch.nn.Module] = []
    fetch, park, copy = FrozenModel.fetch, FrozenModel.park, frozen_module._host_copy

    def fetches(model: FrozenModel) -> None:
        assert not here, "two parked models on the device"
        here.append(model)
        fetched.append(model)
        fetch(model)

    def parks(model: FrozenModel) -> None:
        here.remove(model)
        park(model)

    monkeypatch.setattr(frozen_module, "_host_copy", lambda module, device: made.append(module) or copy(module, device))
    settings = {"micro_tokens": 60, "score_tokens": 60, "dpo_ref": tiny.dpo_ref, "report": False}
    scores = []
    for parked in (False, True):
        if parked:
            monkeypatch.setattr(FrozenModel, "fetch", fetches)
            monkeypatch.setattr(FrozenModel, "park", parks)
        run = build.build(RTOConfig(**small_run(tiny, tmp_path / str(parked), park_frozen=parked, **settings)))
        kept = run.scorers.frozen
        before = [[(there.data_ptr(), there.clone()) for _, there in model.host] for model in kept]
        seen = []
        monkeypatch.setattr(trainer, "score_rollout", lambda *a, s=seen: s.append(score_rollout(*a)) or s[-1])
        for iteration in range(2):
            trainer.rto_iteration(run, iteration)
        run.logger.close()
        scores.append(seen)
        assert [[(t.data_ptr(), list(t.flatten())) for _, t in m.host] for m in kept] == [
            [(place, list(t.flatten())) for place, t in model] for model in before
        ]
    assert len(made) == 4, "reference, DPO model, its reference and the reward model, each once"
    assert not here
    assert [sum(m is model for m in fetched) for model in kept] == [2] * 4, "once in each of two iterations"
    for whole, waiting in zip(*scores, strict=True):
        for name, tensor in dataclasses.asdict(whole[0]).items():
            assert torch.equal(tensor, getattr(waiting[0], name)), name


@torch.no_grad()
def test_a_lent_model_has_one_matrix_on_the_device_at_a_time(tmp_path, monkeypatch):
    """The device is one without storage; what stays there is embeddings, norms and head. On a CPU its bits are the
    model's own."""
    save_llama(tmp_path, seed=1, vocab=87, ids={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    loading = {"dtype": torch.float32, "attention": "sdpa", "argument": "model"}
    plain, here, away = (load_policy(str(tmp_path), **loading) for _ in range(3))
    tokens = torch.arange(4, 12)[None]

    def states(model, device: str):
        return backbone(model.inner)(input_ids=tokens.to(device)).last_hidden_state

    assert torch.equal(states(lent(here, torch.device("cpu")).module, "cpu"), states(plain, "cpu"))

    sizes = {name: linear.weight.numel() for name, linear in matrices(away.inner).items()}
    alive: list[weakref.ref] = []
    peaks: list[int] = []
    product = torch.nn.functional.linear

    def watched(hidden, weight, bias=None):
        alive.append(weakref.ref(weight))
        peaks.append(sum(ref() is not None for ref in alive))
        return product(hidden, weight, bias)

    monkeypatch.setattr(frozen_module.F, "linear", watched)
    found = lent(away, torch.device("meta"))
    assert states(found.module, "meta").is_meta
    assert peaks == [1] * len(sizes)
    assert len(sizes) == 14
    assert all(p.is_meta for p in found.module.parameters())
    numbers = (sum(p.numel() for p in model.parameters()) for model in (plain, found.module))
    assert next(numbers) - next(numbers) == sum(sizes.values())
