"""Whether a run fits on its devices, and which flags help where it does not."""

from __future__ import annotations

import dataclasses
import importlib.util
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rto_fast import distributed
from rto_fast.config import RTOConfig
from rto_fast.errors import ConfigError
from rto_fast.memory.host import PROCESS, host_free, host_phases
from rto_fast.memory.phases import GIB, RESERVE, Machine, Models, least_share, models_of, phases, uses_vllm

STEP = 1024
"""Granule of the micro_tokens that are proposed."""
MOST = 1 << 20
"""Largest micro_tokens that are looked for."""


@dataclass(frozen=True)
class Shortage:
    """The phase that lacks most, and what it lacks. Sizes in bytes."""

    phase: str
    held: float
    """What is on the device when the phase begins."""
    asked: float
    """What the phase asks for beside that."""
    free: float
    host: bool = False
    """Whether it is the memory of a node's host that lacks, for all ranks of the node."""

    def __str__(self) -> str:
        held, asked, free = (f"{x / GIB:.1f}" for x in (self.held, self.asked, self.free))
        where = " of a node's host memory" if self.host else ""
        return f"{self.phase} asks for {asked} GiB{where} beside {held} GiB held, and {free} GiB are free"


def shortage(config: RTOConfig, models: Models, machine: Machine) -> Shortage | None:
    """What is lacking, or None where every phase fits."""
    found = phases(config, models, machine)
    worst = max(found, key=lambda p: p.total)
    if worst.total > machine.device:
        kept = found[0].parts.keys() | found[-1].parts.keys() if worst is not found[0] else {"CUDA and NCCL"}
        held = sum(v for k, v in worst.parts.items() if k in kept)
        return Shortage(worst.name, held, worst.total - held, max(0.0, machine.device - held))
    if uses_vllm(config, machine) and (least := least_share(config, models, machine)) > config.vllm_memory_share:
        share = config.vllm_memory_share * machine.device
        return Shortage("vLLM's weights and one sequence", 0.0, least * machine.device, share)
    return _host_shortage(config, models, machine)


def _host_shortage(config: RTOConfig, models: Models, machine: Machine) -> Shortage | None:
    """What is lacking in the memory of a node's host."""
    worst = max(host_phases(config, models, machine), key=lambda p: p.total)
    if worst.total <= machine.host:
        return None
    held = worst.parts.get("processes", 0.0)
    return Shortage(worst.name, held, worst.total - held, max(0.0, machine.host - held), host=True)


def largest_micro_tokens(config: RTOConfig, models: Models, machine: Machine) -> int:
    """The largest micro_tokens, a multiple of 1024, whose updates fit; 0 where none do."""

    def fits(tokens: int) -> bool:
        trial = dataclasses.replace(config, micro_tokens=tokens)
        return all(p.total <= machine.device for p in phases(trial, models, machine) if p.name.endswith("update"))

    return _largest(fits, STEP, MOST)


def largest_share(config: RTOConfig, models: Models, machine: Machine) -> float:
    """The largest vllm_memory_share, in hundredths, that fits; 0 where none does, or vLLM is not on the device."""
    if not uses_vllm(config, machine):
        return 0.0

    def fits(hundredths: int) -> bool:
        trial = dataclasses.replace(config, vllm_memory_share=hundredths / 100)
        found = phases(trial, models, machine)
        return all(p.total <= machine.device for p in found if p.name in ("vLLM start", "rollout"))

    share = _largest(fits, 1, 99) / 100
    return share if share >= least_share(config, models, machine) else 0.0


def _largest(fits: Callable[[int], bool], step: int, most: int) -> int:
    """The largest multiple of `step` up to `most` that fits, where less always fits as well; 0 = none."""
    low, high = 0, most // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    return low * step


def remedies(config: RTOConfig, models: Models, machine: Machine) -> list[str]:
    """The flags that make the run fit, those that cost least first; [] where none do."""
    chosen: list[dict[str, Any]] = []
    trial = config
    for change in _changes(config, machine):
        trial = dataclasses.replace(trial, **change)
        chosen.append(change)
        adapted = _adapted(trial, models, machine)
        if shortage(adapted, models, machine) is None:
            return _flags(config, _needed(config, chosen, models, machine))
    return []


def _changes(config: RTOConfig, machine: Machine) -> Iterator[dict[str, Any]]:
    """Settings that save memory on the device, in the order of what they cost."""
    yield {}
    if machine.ranks > 1:
        yield {"partition_frozen": "yes", "park_frozen": False}
    if config.gradient_checkpointing is not True:
        yield {"gradient_checkpointing": True}
    if machine.ranks == 1:
        yield {"park_frozen": True, "partition_frozen": "no"}
    if config.zero_stage < 2:
        yield {"zero_stage": 2}
    for split in (2, 4, 8):
        if uses_vllm(config, machine) and machine.ranks % split == 0 and split > config.vllm_tensor_parallel:
            yield {"vllm_tensor_parallel": split, "rollout_engine": "vllm"}
    yield {"zero_stage": 3}
    yield {"offload": True}


def _adapted(config: RTOConfig, models: Models, machine: Machine) -> RTOConfig:
    """With the share and the micro-batches cut to what fits beside the rest."""
    share, tokens = largest_share(config, models, machine), largest_micro_tokens(config, models, machine)
    cut: dict[str, Any] = {}
    if uses_vllm(config, machine) and share:
        least = least_share(config, models, machine)
        cut["vllm_memory_share"] = max(min(config.vllm_memory_share, share), min(share, round(least + 0.005, 2)))
    if tokens:
        cut["micro_tokens"] = min(config.micro_tokens, tokens)
    return dataclasses.replace(config, **cut)


def _needed(config: RTOConfig, chosen: list[dict[str, Any]], models: Models, machine: Machine) -> RTOConfig:
    """The settings after the chosen changes, without those that are not needed beside the later ones."""

    def after(changes: list[dict[str, Any]]) -> RTOConfig:
        merged = {k: v for change in changes for k, v in change.items()}
        return _adapted(dataclasses.replace(config, **merged), models, machine)

    kept = list(chosen)
    for change in chosen:
        fewer = [c for c in kept if c is not change]
        if shortage(after(fewer), models, machine) is None:
            kept = fewer
    return after(kept)


def _flags(config: RTOConfig, other: RTOConfig) -> list[str]:
    """Flags that turn one config into the other, in the order of `_changes`."""
    order = (
        "vllm_memory_share", "micro_tokens", "partition_frozen", "park_frozen", "gradient_checkpointing",
        "rollout_engine", "vllm_tensor_parallel", "zero_stage", "offload",
    )  # fmt: skip
    return [
        f"--{name.replace('_', '-')} {getattr(other, name)}"
        for name in order
        if getattr(config, name) != getattr(other, name)
    ]


def require_fit(config: RTOConfig, models: Models, machine: Machine) -> None:
    """Raises ConfigError where the run cannot fit, with what is held, asked and free, and the flags that help."""
    lacking = shortage(config, models, machine)
    if lacking is None:
        return
    helps = remedies(config, models, machine)
    with_flags = f"it fits with {' '.join(helps)}" if helps else "no flag makes it fit; take more or larger devices"
    raise ConfigError(
        f"memory: on {machine.ranks} device{'s' * (machine.ranks > 1)} of {machine.device / GIB:.1f} GiB {lacking}; "
        f"{with_flags}. `rto-fast memory` shows every phase, --memory-check False starts all the same"
    )


def check_device(config: RTOConfig, device: torch.device, ranks: int) -> None:
    """`require_fit` of this rank's GPU and host, before anything is loaded; nothing on a CPU, or without memory_check.

    Collective.
    """
    if device.type != "cuda" or not config.memory_check:
        return
    free, total = torch.cuda.mem_get_info(device)
    if config.rollout_engine == "auto" and importlib.util.find_spec("vllm") is None:
        config = dataclasses.replace(config, rollout_engine="transformers")
    taken = max(RESERVE, total - free)  # by others too
    on_node = distributed.hosts().count(socket.gethostname())
    host = host_free() + on_node * PROCESS  # the processes are there already
    require_fit(config, models_of(config), Machine(ranks, total, taken, node_ranks=on_node, host=host))
