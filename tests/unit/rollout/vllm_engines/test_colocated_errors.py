"""What vLLM's faults in the training process become, and whose random state and threads are whose; no vLLM runs."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy
import pytest
import torch

from rto_fast.errors import ConfigError, DeviceLost, EngineFailure, OutOfMemory, SyncError
from rto_fast.rollout.vllm_engines import colocated
from rto_fast.rollout.vllm_engines.colocated import VLLMEngine

FAULTS = [
    (torch.AcceleratorError("illegal memory access"), DeviceLost, "broke the CUDA context"),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceLost, "broke the CUDA context"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OutOfMemory, "ran out of memory"),
    (RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:119"), OutOfMemory, "ran out of memory"),
    (RuntimeError("cancelled"), EngineFailure, r"failed \(.*\): RuntimeError: cancelled"),
]


def raising(error: Exception) -> Callable[..., None]:
    def act(*_: object, **__: object) -> None:
        raise error

    return act


def engine_of(**calls) -> VLLMEngine:
    """An engine that is awake and holds weights; calls: what its LLM does."""
    engine = object.__new__(VLLMEngine)
    engine.llm = SimpleNamespace(**calls)
    engine.memory = SimpleNamespace(wake_weights=lambda: None, lost=False, asleep=set())
    engine.pushed = SimpleNamespace(checked_once=iter, require_all=lambda digests: None)
    engine.adapter = None
    engine.device, engine.torn, engine.version, engine.timeout_s = torch.device("cpu"), "", 0, 60.0
    return engine


@pytest.mark.parametrize(("error", "kind", "message"), FAULTS)
def test_a_push_that_breaks(error, kind, message):
    with pytest.raises(kind, match=f"pushing weights to vLLM {message}"):
        engine_of(collective_rpc=raising(error)).push(iter(()), 1)
    engine = engine_of(collective_rpc=lambda *_, **__: None, reset_prefix_cache=raising(error))
    with pytest.raises(kind, match=f"emptying vLLM's cache {message}"):
        engine.push(iter(()), 1)
    assert engine.torn


def test_weights_that_are_wrong_are_no_fault_of_the_engines():
    for error in (ValueError("shape"), KeyError("name"), AssertionError("size")):
        with pytest.raises(SyncError, match="vLLM did not take the weights"):
            engine_of(collective_rpc=raising(error)).push(iter(()), 1)


def test_a_cache_that_still_holds_old_keys():
    engine = engine_of(collective_rpc=lambda *_, **__: None, reset_prefix_cache=lambda: False)
    with pytest.raises(SyncError, match="keys and values of the old weights"):
        engine.push(iter(()), 1)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            ValueError("No available memory for the cache blocks."),
            ConfigError,
            "vllm_memory_share: vLLM does not",
        ),
        (ValueError("KV cache of 3 GiB is needed"), ConfigError, "vllm_memory_share: .*with 0.4 of the memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), ConfigError, "vllm_memory_share: .*ran out of memory"),
        (
            ValueError("max_model_len (4096) is greater than 2048"),
            ConfigError,
            "rollout_engine: .*of 64 tokens",
        ),
        (torch.AcceleratorError("illegal memory access"), DeviceLost, "starting vLLM broke the CUDA context"),
        (AssertionError("in __init__"), EngineFailure, "starting vLLM failed .*AssertionError: in __init__"),
    ],
)
def test_an_engine_that_does_not_start(error, kind, message):
    with pytest.raises(kind, match=message):
        raise colocated._does_not_start(error, 0.4, 64)


def test_one_thread_and_the_trainers_random_state():
    threads, states = torch.get_num_threads(), (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1])
    torch.set_num_threads(3)
    try:
        with colocated._trainers_own(one_thread=True):
            assert torch.get_num_threads() == 1
            torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
        assert torch.get_num_threads() == 3
        with colocated._trainers_own():
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()
