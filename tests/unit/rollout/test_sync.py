"""What the proof of a sync rests on: moving weights and back without a copy, and checksums of what arrived."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rto_fast import distributed
from rto_fast.errors import DeviceLost, EngineFailure, OutOfMemory, RolloutError
from rto_fast.rollout.engine import Sampling, SyncStats
from rto_fast.rollout.weights.fingerprint import Fingerprint
from rto_fast.rollout.weights.sync import Gap, WeightSync, _difference, move, proof_limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_moves_and_comes_back_bit_for_bit(dtype):
    layer = nn.Linear(64, 64).to(dtype)
    with torch.no_grad():
        layer.bias[:4] = torch.tensor([0.0, 0.0625, -0.0, 0.078125])
    before = [p.detach().clone() for p in layer.parameters()]
    move(layer)
    share = ((layer.weight - before[0]) / before[0]).abs()
    assert ((share > 0.1) & (share < 0.35)).float().mean() > 0.98
    assert layer.bias[0] == 0.0625
    move(layer)
    words = torch.int32 if dtype == torch.float32 else torch.int16
    for p, old in zip(layer.parameters(), before, strict=True):
        assert torch.equal(p.detach().view(words), old.view(words))


def test_the_proof_allows_rounding_and_no_more():
    """An engine .049 nat off in fp32 is no sampler of the policy, however far the weights were moved."""
    for blind in (0.01, 0.5, 30.0):
        assert 3e-6 < proof_limit("fp32", Gap(blind, blind)) < 0.001
        assert 0.03 <= proof_limit("bf16", Gap(blind, blind)) <= 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_shows_any_change(dtype):
    tensor = torch.randn(33, 65, generator=torch.Generator().manual_seed(0)).to(dtype)
    other = tensor.clone()
    other.view(-1)[[3, 40]] = other.view(-1)[[40, 3]]
    last_bit = tensor.clone()
    last_bit.view(torch.int16)[-1, -1] ^= 1
    found = set()
    for one in (tensor, other, last_bit, tensor.T, tensor[:-1]):
        print_of = Fingerprint()
        print_of.add("w", one)
        found.add(print_of.digests()["w"])
    assert len(found) == 5
    again = Fingerprint()
    again.add("w", tensor.clone())
    assert again.digests()["w"] in found
    assert again.bytes == tensor.numel() * tensor.element_size()
    with pytest.raises(ValueError, match="w: added twice"):
        again.add("w", tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_opposite_changes_do_not_cancel(dtype):
    """Every pair of neighbours in rounding, one up and one down, and every swap of two words gives another digest."""
    words = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    tensor = (1 + torch.arange(48) / 64).to(dtype)
    found, count = set(), 0
    for i in range(48):
        for j in range(48):
            if i == j:
                continue
            changed = tensor.clone()
            changed.view(words)[i] += 1
            changed.view(words)[j] -= 1
            swapped = tensor.clone()
            swapped[[i, j]] = swapped[[j, i]]
            for one in (changed, swapped) if i < j else (changed,):
                print_of = Fingerprint()
                print_of.add("w", one)
                found.add(print_of.digests()["w"])
                count += 1
    assert len(found) == count


def test_what_arrived_otherwise_is_named():
    assert _difference({"a": 1, "b": 2}, {"a": 1, "b": 2}) == ""
    assert "b: sent but not received (1 of 2)" in _difference({"a": 1, "b": 2}, {"a": 1})
    assert "b: received with other bytes" in _difference({"a": 1, "b": 2}, {"a": 1, "b": 3})


# An engine that forgets its weights, or fails


class Forgetful:
    """An engine that loses its weights when it sleeps, as vLLM's does; `fails` gives the errors of its next wakes."""

    def __init__(self, fails=()):
        self.blank, self.version, self.log, self.fails = False, 0, [], list(fails)

    def push(self, weights, version):
        received = Fingerprint()
        for name, tensor in weights:
            received.add(name, tensor)
        self.blank, self.version = False, version
        self.log.append(f"push {version}")
        return SyncStats(received.bytes, 0.0, len(received), received.digests())

    def sleep(self):
        self.blank = True
        self.log.append("sleep")

    def wake(self):
        assert not self.blank
        if self.fails:
            raise self.fails.pop(0)

    def generate(self, requests, sampling, progress, keep=None):
        self.log.append("generate")
        return SimpleNamespace(version=self.version)


def sync_of(*engines) -> WeightSync:
    """A run's sync that is given these engines one after the other."""
    policy = SimpleNamespace(weights=lambda: [("w", torch.ones(3))])
    left = iter(engines)
    return WeightSync(SimpleNamespace(), lambda: next(left), policy, None)


SAMPLING = Sampling(1, 1.0, ())


def test_an_engine_sleeps_from_its_start_and_is_pushed_before_it_samples():
    engine = Forgetful()
    sync = sync_of(engine)
    sync.push(1)
    sync.sample([], SAMPLING)
    sync.sample([], SAMPLING)  # an iteration without a push of its own: the last version comes back
    assert engine.log == ["sleep", "push 1", "generate", "sleep", "push 1", "generate", "sleep"]


def test_an_engine_that_fails_is_replaced_and_pushed_once():
    engines = Forgetful([EngineFailure("gone")]), Forgetful()
    sync = sync_of(*engines)
    sync.push(4)
    assert sync.sample([], SAMPLING).version == 4
    assert engines[1].log == ["sleep", "push 4", "generate", "sleep"]


def test_memory_that_is_short_on_another_rank_ends_every_rank(monkeypatch):
    """This rank's engine is well; no rank starts another one."""
    engine = Forgetful()
    sync = sync_of(engine)
    sync.push(1)
    there = [EngineFailure("gone"), OutOfMemory("waking vLLM's cache ran out of memory")]
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, *there] if mine is None else [mine])
    with pytest.raises(RolloutError, match=r"waking vLLM's cache ran out of memory\. The last checkpoint is whole"):
        sync.sample([], SAMPLING)


def test_a_lost_device_is_not_caught():
    sync = sync_of(Forgetful([DeviceLost("broke the CUDA context")]))
    sync.push(1)
    with pytest.raises(DeviceLost):
        sync.sample([], SAMPLING)
