"""Bytes of host memory that the ranks of one node, rank 0's, hold together.

A model that ZeRO-3 takes apart is whole in rank 0's memory until it is spread (models/skeleton.py), one that is to be
in codes in every rank's. Others go from their files to the device, a few tensors at a time. Pages of the files are not
counted: the system takes them back.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import psutil

from rto_fast.backend.frozen import partitions
from rto_fast.config import RTOConfig
from rto_fast.memory.phases import (
    GIB,
    Machine,
    Models,
    Phase,
    frozen_bytes,
    sampler_of,
    sleeps_with_base,
    stands,
    states_of,
    weights_of,
    whole_one,
    width,
)
from rto_fast.memory.shapes import ModelShape

PROCESS = 3 * GIB
"""What Python, torch, CUDA's and NCCL's host side take of a rank on GPUs; an estimate."""
GROUP = Path("/sys/fs/cgroup")
"""Where a container finds its limits."""
READERS = 4
"""Tensors that transformers reads at once."""

Parts = dict[str, float]


def host_phases(config: RTOConfig, models: Models, machine: Machine) -> list[Phase]:
    """Loading at its peak, and training."""
    return [
        Phase("loading", max(_loading(config, models, machine), key=lambda parts: sum(parts.values()))),
        Phase("training", _held(config, models, machine, trained=True)),
    ]


def _loading(config: RTOConfig, models: Models, machine: Machine) -> Iterator[Parts]:
    """What is held while each model is loaded, in the order of build.py, and once all are there."""
    for i, (name, shape) in enumerate(models.trained):
        before = _held(config, Models(models.policy, None, ()), machine, policy=i > 0)
        if not stands(config, shape, trained=True):
            yield before | _read(config, name, shape, machine, spread=config.zero_stage == 3)
    for i, (name, shape) in enumerate(models.frozen):
        before = _held(config, dataclasses.replace(models, frozen=models.frozen[:i]), machine)
        spread = partitions(config, machine.ranks, machine.kind)
        if not stands(config, shape):
            yield before | _read(config, name, shape, machine, spread=spread)
    built = _held(config, models, machine, sampler=True)
    yield built | {name: machine.on_node * size for name, size in whole_one(config, models).items()}


def _read(config: RTOConfig, name: str, s: ModelShape, machine: Machine, *, spread: bool) -> Parts:
    """A model that is being read."""
    size = float(width(config) * s.parameters)
    if spread and machine.ranks > 1:
        parts = {f"{name}, parts": machine.on_node * size / machine.ranks} if machine.kind == "cpu" else {}
        return {f"{name}, whole on rank 0": size} | parts
    if machine.kind == "cpu":
        return {f"{name}, read": machine.on_node * size}
    return {f"{name}, tensors that are read": float(machine.on_node * READERS * width(config) * s.largest)}


def _held(
    config: RTOConfig, models: Models, machine: Machine, *, policy: bool = True, trained: bool = False,
    sampler: bool = False,
) -> Parts:  # fmt: skip
    """What lies there between loads. policy: its engine is there; trained: with AdamW's moments; sampler: it too."""
    ranks, split = machine.on_node, machine.ranks
    out: Parts = {}
    if machine.kind == "cpu":  # the host is the device
        parts = weights_of(config, models, split) | states_of(config, models, split) if policy else {}
        out = {k: ranks * v for k, v in parts.items() if trained or not k.endswith("moments")}
        out |= {"sampler": ranks * sampler_of(config, models, machine)} if sampler or trained else {}
    else:
        out = {"processes": float(ranks * PROCESS)}
        for name, s in models.trained if config.offload and policy else []:
            size = ranks * s.trained / split
            out[f"{name} fp32 weights"] = 4 * size
            out[f"{name} buffers"] = width(config) * size
            if trained or config.zero_stage == 3:
                out[f"{name} gradients"] = 4 * size
            if trained:
                out[f"{name} moments"] = 8 * size
        if (sampler or trained) and models.policy.adapter and sleeps_with_base(config, machine):
            out["vLLM's base while it sleeps"] = (
                ranks * width(config) * models.policy.parameters / config.vllm_tensor_parallel
            )
    partitioned = partitions(config, split, machine.kind)
    for i, (name, s) in enumerate(models.frozen):
        own = not stands(config, s)
        if machine.kind == "cpu" or (config.park_frozen and not partitioned and own):
            share = split if partitioned and (own or config.zero_stage == 3) else 1
            out[f"{name}{i if name in out else ''}"] = ranks * frozen_bytes(config, s) / share
    return out


def host_free() -> float:
    """Bytes that may still be taken on this machine, or in this container where one has a limit."""
    free = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit, used = (int((GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        pages = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(pages["file"]))  # pages of files, which the system takes back
    return free
