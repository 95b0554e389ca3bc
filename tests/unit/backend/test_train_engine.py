"""DeepSpeed's part: sums over micro-batches in bf16, who waits for whom, and learning rates."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from loop_helpers import small_run, watched_gradients

from rto_fast import distributed
from rto_fast.backend.frozen import frozen
from rto_fast.backend.train_engine import TrainEngine, deepspeed_config, learning_rate
from rto_fast.config import RTOConfig
from rto_fast.models.attention import PACKED
from rto_fast.models.load import load_policy
from rto_fast.models.packing import PackedBatch, micro_batches

pytestmark = pytest.mark.usefixtures("one_rank")

LOADING = {"attention": PACKED, "argument": "policy"}


def gradients(tiny, folder, stage: int, budget: int) -> torch.Tensor:
    """All gradients of a mean negative log-prob over 48 sequences in micro-batches of `budget` tokens, in bf16."""
    config = RTOConfig(**small_run(tiny, folder, dtype="bf16", zero_stage=stage, max_grad_norm=0.0))
    policy = load_policy(tiny.policy, dtype=torch.bfloat16, **LOADING)
    engine = TrainEngine(policy, config, peak_lr=1e-3, total_steps=1)
    random = torch.Generator().manual_seed(0)
    lens = torch.randint(10, 60, (48,), generator=random).tolist()
    sequences = [torch.randint(3, 80, (n,), generator=random) for n in lens]

    def loss(index: list[int]) -> torch.Tensor:
        chosen = [sequences[i] for i in index]
        logp = engine(PackedBatch.make(chosen, [3] * len(index), torch.device("cpu"), "sdpa"))
        return -logp.sum() / sum(lens)

    with watched_gradients(engine) as seen:
        engine.update(micro_batches(range(len(lens)), lens, budget), loss, step=0)
    return torch.cat([g.flatten() for g in seen.values()])


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_micro_batches_are_summed_in_fp32(tiny, tmp_path, stage):
    """48 micro-batches against one: each rounds to bf16 once (0.3 % apart here), their sum does not (then 0.9 %)."""
    whole, parts = (gradients(tiny, tmp_path, stage, budget) for budget in (4096, 1))
    assert float((parts - whole).norm() / whole.norm()) < 0.005


@pytest.mark.parametrize("kind", ["trained", "frozen"])
def test_ranks_meet_before_deepspeeds_own_collectives(tiny, tmp_path, monkeypatch, kind):
    """Those give up after 10 minutes, which a model's download on one machine may outlast."""
    seen = []

    def initialize(**_):
        seen.append("initialize")
        raise InterruptedError

    monkeypatch.setattr(distributed, "barrier", lambda: seen.append("barrier"))
    monkeypatch.setattr("deepspeed.initialize", initialize)
    config = RTOConfig(**small_run(tiny, tmp_path, zero_stage=3))
    policy = load_policy(tiny.policy, dtype=torch.float32, **LOADING)
    make = {
        "trained": lambda: TrainEngine(policy, config, peak_lr=1e-3, total_steps=1),
        "frozen": lambda: frozen(policy, config),
    }[kind]
    with pytest.raises(InterruptedError):
        make()
    assert seen == ["barrier", "initialize"]


@pytest.mark.parametrize("kind", ["trained", "frozen"])
def test_deepspeeds_groups_wait_as_long_as_ours(tiny, tmp_path, kind):
    """A checkpoint of many GB on a slow file system outlasts torch's ten minutes."""
    config = RTOConfig(**small_run(tiny, tmp_path, zero_stage=3))
    policy = load_policy(tiny.policy, dtype=torch.float32, **LOADING)
    dist.new_group([0])
    _ = TrainEngine(policy, config, peak_lr=1e-3, total_steps=1) if kind == "trained" else frozen(policy, config)
    groups = list(dist.distributed_c10d._world.pg_map)
    waits = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    assert len(groups) > 1
    assert waits == {distributed.TIMEOUT}


@pytest.mark.parametrize(("kind", "stage", "overlaps"), [("cpu", 3, False), ("cuda", 3, True), ("cuda", 2, False)])
def test_weights_come_while_gpus_compute(tiny, tmp_path, monkeypatch, kind, stage, overlaps):
    monkeypatch.setattr(distributed, "device", lambda: torch.device(kind))
    config = RTOConfig(**small_run(tiny, tmp_path, zero_stage=stage))
    assert deepspeed_config(config)["zero_optimization"]["overlap_comm"] == overlaps


@pytest.mark.parametrize(("setting", "limit", "recomputes"), [
    ("auto", 0, True), ("auto", 10**6, False), (True, 10**6, True), (False, 0, False),
])  # fmt: skip
def test_only_large_models_compute_their_activations_again(tiny, tmp_path, monkeypatch, setting, limit, recomputes):
    monkeypatch.setattr("rto_fast.config.base.SMALL_MODEL", limit)
    config = RTOConfig(**small_run(tiny, tmp_path, gradient_checkpointing=setting))
    policy = load_policy(tiny.policy, dtype=torch.float32, **LOADING)
    TrainEngine(policy, config, peak_lr=1e-3, total_steps=1)
    assert policy.inner.is_gradient_checkpointing == recomputes


def test_learning_rate_schedule():
    """3 % linear warm-up, then a cosine to a tenth of the peak, as the paper's runs."""
    total, peak, warmup = 1000, 5e-7, 30
    rates = [learning_rate(s, total, peak, 0.03, 0.1) for s in range(total)]
    for s in range(warmup):
        assert rates[s] == pytest.approx(peak * (s + 1) / warmup)
    for s in range(warmup, total):
        cosine = (1 + math.cos(math.pi * (s - warmup) / (total - warmup))) / 2
        assert rates[s] == pytest.approx(0.1 * peak + 0.9 * peak * cosine)
    assert max(rates) == rates[warmup] == peak
    assert rates[-1] == pytest.approx(0.1 * peak, rel=1e-3)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert learning_rate(0, 1, peak, 0.03, 0.1) == peak, "a run of one step takes the peak"
    assert learning_rate(0, 10, peak, 0.0, 0.1) == peak, "no warm-up"
    assert learning_rate(5, 10, peak, 0.0, 1.0) == peak, "a floor of 1 is constant"
