"""Free the device's memory while the trainer works.

The order is the one that all accepted versions of vLLM allow:

    sleep(2) -> train -> empty the trainer's cache -> wake(weights) -> push -> wake(kv_cache) -> generate -> sleep(2)

Level 2 drops weights and cache and copies nothing to the host: every push brings the weights anyway. Where a push
brings an adapter alone, the engine sleeps at level 1: the weights under it lie in the host's memory meanwhile. Up to
0.30 vLLM does not sleep while a part of it is asleep, and 0.26 and 0.27 map memory a second time where it was woken in
parts and then as a whole. On a CPU vLLM keeps its memory, but the order is the same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from rto_fast.errors import DeviceLost, EngineFailure, OutOfMemory, RolloutError

WEIGHTS, CACHE = "weights", "kv_cache"
"""The parts of an engine that vLLM wakes one by one."""
GIB = 1 << 30


class Memory:
    """What an LLM holds on its device."""

    def __init__(self, llm: Any, *, keeps: bool = False) -> None:
        """llm: vLLM's LLM, awake; keeps: weights and adapter outlast a sleep, in the host's memory."""
        self.llm, self.keeps = llm, keeps
        self.asleep: set[str] = set()
        """Parts that hold no memory."""
        self.lost = False
        """Whether the weights are gone since the last sleep; a push brings them back."""
        self.slept_bytes = 0
        """What the last sleep freed; 0 where that is not known."""

    def sleep(self) -> None:
        """Frees weights and cache; once is enough. EngineFailure where vLLM does not."""
        if WEIGHTS in self.asleep:
            return
        self._wake(CACHE)
        before = free_bytes()
        failing_as("putting vLLM to sleep", lambda: self.llm.sleep(level=1 if self.keeps else 2))
        self.slept_bytes = max(0, free_bytes() - before)
        self.asleep, self.lost = {WEIGHTS, CACHE}, not self.keeps

    def wake_weights(self) -> None:
        """Makes room for a push. Raises as `wake`."""
        self._wake(WEIGHTS)

    def wake(self) -> None:
        """Makes room for the cache, the last thing before sampling.

        Raises RolloutError where nothing was pushed since the last sleep, OutOfMemory, EngineFailure and DeviceLost
        where vLLM does not wake.
        """
        if self.lost:
            raise RolloutError("sleeping has dropped the engine's weights; push() brings them back")
        self._wake(WEIGHTS)
        self._wake(CACHE)

    def close(self) -> None:
        """Wakes what sleeps, for memory that is not mapped cannot be given back. Raises as `wake`."""
        if torch.accelerator.is_available():
            failing_as("closing vLLM", torch.accelerator.synchronize)  # shows a broken context
        for part in (WEIGHTS, CACHE):
            self._wake(part)

    def _wake(self, part: str) -> None:
        if part not in self.asleep:
            return

        def wake() -> None:
            empty_cache()
            self.llm.wake_up(tags=[part])

        failing_as(f"waking vLLM's {'cache' if part == CACHE else part}", wake, self.slept_bytes)
        self.asleep.remove(part)


def failing_as(phase: str, act: Callable[[], object], wanted_bytes: int = 0) -> None:
    """Calls `act`; what it raises becomes the run's own error, which says the phase and the GiB that were free.

    Raises OutOfMemory where memory ran out, DeviceLost after a CUDA fault, else EngineFailure. wanted_bytes: that
    weights and cache take together; 0 = unknown.
    """
    try:
        act()
    except Exception as error:
        raise failure(phase, error, wanted_bytes) from error


def failure(
    phase: str, error: Exception, wanted_bytes: int = 0, remedy: str = "lower --vllm-memory-share or --micro-tokens"
) -> EngineFailure | DeviceLost:
    """The run's own error for one of vLLM's; see `failing_as`. remedy: where memory ran out."""
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if "out of memory" in str(error).lower() or isinstance(error, torch.OutOfMemoryError):
        wanted = f", weights and cache take {wanted_bytes / GIB:.1f} together" if wanted_bytes else ""
        return OutOfMemory(f"{phase} ran out of memory ({_free()}{wanted}); {remedy}: {what}")
    if isinstance(error, torch.AcceleratorError) or "cuda error" in str(error).lower():
        return DeviceLost(f"{phase} broke the CUDA context ({what}); this process can compute no more. "
                          "The last checkpoint is whole")  # fmt: skip
    return EngineFailure(f"{phase} failed ({_free()}): {what}")


def free_bytes() -> int:
    """Free memory of the device; 0 without an accelerator, and where it does not say."""
    try:
        return torch.accelerator.get_memory_info()[0] if torch.accelerator.is_available() else 0
    except RuntimeError:
        return 0


def empty_cache() -> None:
    """Gives memory that torch holds and nobody uses back to the device."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def release_pools(device: torch.device) -> None:
    """Gives the memory of an LLM that nobody holds any more back; until then no other one can start."""
    gc.collect()
    if device.type == "cuda":
        from vllm.device_allocator.cumem import CuMemAllocator

        if CuMemAllocator.instance is not None:
            CuMemAllocator.instance.release_pools()
    empty_cache()


def _free() -> str:
    try:
        free, total = torch.accelerator.get_memory_info()
    except RuntimeError:
        return "free memory unknown"
    return f"{free / GIB:.1f} of {total / GIB:.1f} GiB were free"
