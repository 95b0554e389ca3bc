"""vLLM's memory: the order of sleeps and wakes under each version's rules, and what its errors become."""

from __future__ import annotations

import pytest
import torch
from sleep_helpers import PARTS, RULES, SleepingMemory

from rto_fast.errors import DeviceLost, EngineFailure, OutOfMemory, RolloutError
from rto_fast.rollout.vllm_engines import sleeping
from rto_fast.rollout.vllm_engines.sleeping import GIB, Memory, failure


@pytest.fixture(params=RULES)
def device(request):
    return SleepingMemory(request.param)


def pushed(memory: Memory, device: SleepingMemory) -> None:
    memory.wake_weights()
    device.touch("weights")
    memory.lost = False


def test_three_iterations_free_everything_and_copy_nothing(device):
    memory = Memory(device)
    memory.sleep()
    for _ in range(3):
        assert not any(device.mapped.values())  # the trainer has the device for itself
        pushed(memory, device)
        memory.wake()
        device.touch(*PARTS)
        memory.sleep()
    assert device.copies == 0
    assert device.log == ["sleep 2", *["wake weights", "wake kv_cache", "sleep 2"] * 3]


def test_what_lies_under_an_adapter_outlasts_a_sleep(device):
    """It is copied to the host and back, and an engine that was pushed nothing since can sample."""
    memory = Memory(device, keeps=True)
    for push in (True, False, True):
        memory.sleep()
        assert not any(device.mapped.values())
        if push:
            memory.wake_weights()
            device.touch("weights")
        memory.wake()
        device.touch(*PARTS)
    assert not memory.lost
    assert device.copies == 6
    assert device.log == ["sleep 1", "wake weights", "wake kv_cache"] * 3


def test_sleeping_twice_and_waking_twice_are_harmless(device):
    memory = Memory(device)
    memory.wake()
    for _ in range(2):
        memory.sleep()
    for _ in range(2):
        pushed(memory, device)
    for _ in range(2):
        memory.wake()
    device.touch(*PARTS)
    assert device.log == ["sleep 2", "wake weights", "wake kv_cache"]


def test_a_pushed_engine_that_did_not_sample_can_sleep(device):
    """Up to 0.30 vLLM ignores a sleep while its cache is asleep."""
    memory = Memory(device)
    memory.sleep()
    pushed(memory, device)
    memory.sleep()
    assert not any(device.mapped.values())
    assert memory.lost
    pushed(memory, device)
    memory.wake()
    device.touch(*PARTS)


@pytest.mark.parametrize("woken", [False, True])
def test_weights_that_were_not_pushed_are_never_sampled_from(device, woken):
    memory = Memory(device)
    memory.sleep()
    if woken:
        memory.wake_weights()
    with pytest.raises(RolloutError, match="dropped the engine's weights"):
        memory.wake()


@pytest.mark.parametrize("until", ["sleep", "push", "wake"])
def test_closing_wakes_first(device, until):
    memory = Memory(device)
    memory.sleep()
    if until != "sleep":
        pushed(memory, device)
    if until == "wake":
        memory.wake()
    memory.close()
    assert all(device.mapped.values())


def test_a_wake_without_room_says_what_it_wanted(device, monkeypatch):
    free = iter([10 * GIB, 42 * GIB])
    monkeypatch.setattr(sleeping, "free_bytes", lambda: next(free))
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (3 * GIB, 80 * GIB))
    memory = Memory(device)
    memory.sleep()
    monkeypatch.setattr(device, "wake_up", lambda tags: refuse("CUDA Error: out of memory at cumem_allocator.cpp:119"))
    figures = r"\(3\.0 of 80\.0 GiB were free, weights and cache take 32\.0 together\); lower --vllm-memory-share"
    with pytest.raises(OutOfMemory, match=f"waking vLLM's weights ran out of memory {figures}"):
        memory.wake_weights()
    assert memory.asleep == {"weights", "kv_cache"}


def refuse(message: str) -> None:
    raise RuntimeError(message)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), OutOfMemory, "a phase ran out of memory"),
        (torch.AcceleratorError("illegal"), DeviceLost, "a phase broke the CUDA context"),
        (RuntimeError("CUDA error: an illegal memory access"), DeviceLost, "last checkpoint is whole"),
        (AssertionError("Memory usage increased after sleeping."), EngineFailure, "a phase failed .*AssertionError"),
        (AssertionError(), EngineFailure, r"a phase failed .*: AssertionError$"),
        (ValueError("odd"), EngineFailure, "ValueError: odd"),
    ],
)
def test_errors_of_vllm(error, kind, message):
    with pytest.raises(kind, match=message):
        raise failure("a phase", error)
    assert isinstance(failure("a phase", error), EngineFailure) == (kind is not DeviceLost)
