"""`rto-fast memory`: what a run needs, before any device is there."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from rto_fast.config import RTOConfig
from rto_fast.errors import require
from rto_fast.memory.fit import largest_micro_tokens, largest_share, remedies, shortage
from rto_fast.memory.host import host_phases
from rto_fast.memory.phases import GIB, RESERVE, Machine, Models, Phase, least_share, models_of, phases, uses_vllm
from rto_fast.memory.seconds import Rates, checkpoint_bytes, seconds


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(RTOConfig):
    """Memory and time of a run with these flags, by arithmetic on its models' configs.

    Takes every flag of `rto-fast rto`. A model is a folder, a config.json, a Hub id, or llama-3.2-1b, llama-3-8b,
    llama-3-70b, whose configs come along. With --lora-rank such a name stands for an adapter on weights of that size,
    and the policy's name for one on the policy's base.
    """

    policy: str = "llama-3-8b"
    dpo_model: tuple[str, ...] = ("llama-3-8b",)
    reward_model: tuple[str, ...] = ("llama-3.2-1b",)
    data: str = "none"
    ranks: int = 8
    """Devices, one rank each."""
    device_gib: float = 79.6
    """Memory of one device, GiB."""
    reserve_gib: float = RESERVE / GIB
    """What CUDA and NCCL take of it, GiB."""
    node_ranks: int = 8
    """Devices of one node, which share its host memory."""
    host_gib: float = 1900.0
    """Memory of a node's host, GiB."""
    tflops: float = 400.0
    """Products that a device reaches in bf16, TFLOP/s."""
    memory_gbps: float = 2600.0
    """What it reads from its own memory, GB/s."""
    link_gbps: float = 200.0
    """What it gets from the other ranks, GB/s."""
    disk_gbps: float = 2.0
    """What all ranks together write to disk, GB/s."""

    def validate(self) -> None:
        super().validate()
        require(self.ranks >= 1, f"ranks: must be at least 1, got {self.ranks}")
        require(self.reserve_gib >= 0, f"reserve_gib: must not be negative, got {self.reserve_gib}")
        require(self.node_ranks >= 1, f"node_ranks: must be at least 1, got {self.node_ranks}")
        for name in ("device_gib", "host_gib", "tflops", "memory_gbps", "link_gbps", "disk_gbps"):
            require(getattr(self, name) > 0, f"{name}: must be positive, got {getattr(self, name)}")
        require(
            self.ranks % self.vllm_tensor_parallel == 0,
            f"vllm_tensor_parallel: {self.vllm_tensor_parallel} does not divide {self.ranks} ranks",
        )

    @property
    def machine(self) -> Machine:
        return Machine(
            self.ranks, self.device_gib * GIB, self.reserve_gib * GIB, node_ranks=self.node_ranks,
            host=self.host_gib * GIB,
        )  # fmt: skip

    @property
    def rates(self) -> Rates:
        return Rates(self.tflops * 1e12, self.memory_gbps * 1e9, self.link_gbps * 1e9, self.disk_gbps * 1e9)


def show(config: MemoryConfig) -> None:
    """Prints the phases, the most that fits, seconds, and the verdict."""
    models = models_of(config)
    console = Console()
    console.print(_table(config, phases(config, models, config.machine), models))
    for line in conclusions(config, models):
        console.print(line, highlight=False, soft_wrap=True)


def _table(config: MemoryConfig, found: list[Phase], models: Models) -> Table:
    table = Table("phase", "GiB", "free", "s", "largest parts", title=f"{config.ranks} x {config.device_gib:g} GiB")
    times = seconds(config, models, config.machine, config.rates)
    for phase in found:
        took = f"{times[phase.name]:.1f}" if times.get(phase.name) else ""
        table.add_row(phase.name, *_sizes(phase, config.device_gib), took, _parts(phase))
    table.add_section()
    for phase in host_phases(config, models, config.machine):
        name = f"{phase.name}, host of {config.machine.on_node} rank{'s' * (config.machine.on_node > 1)}"
        table.add_row(name, *_sizes(phase, config.host_gib), "", _parts(phase))
    return table


def _sizes(phase: Phase, room: float) -> tuple[str, str]:
    """GiB that the phase takes, and that are left."""
    return f"{phase.total / GIB:.1f}", f"{room - phase.total / GIB:.1f}"


def _parts(phase: Phase) -> str:
    parts = sorted(phase.parts.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)


def conclusions(config: MemoryConfig, models: Models) -> list[str]:
    """The most that fits, an iteration's seconds, a checkpoint's size, and whether the run fits."""
    machine, out = config.machine, []
    out.append(f"largest --micro-tokens: {largest_micro_tokens(config, models, machine)}")
    if uses_vllm(config, machine):
        least = least_share(config, models, machine)
        most = largest_share(config, models, machine)
        out.append(
            f"--vllm-memory-share: {least:.2f} at least, " + (f"{most:.2f} at most" if most else "and none fits")
        )
    times = seconds(config, models, machine, config.rates)
    total = sum(v for k, v in times.items() if k != "checkpoint")
    out.append(f"an iteration, sequences of full length: {total:.0f} s ("
               + ", ".join(f"{k} {v:.1f}" for k, v in times.items() if v) + ")")  # fmt: skip
    size = checkpoint_bytes(config, models) / 1e9
    out.append(f"a checkpoint: {size:.{0 if size >= 10 else 2}f} GB")
    lacking = shortage(config, models, machine)
    if lacking is None:
        return [*out, "it fits"]
    helps = remedies(config, models, machine)
    return [*out, f"it does not fit: {lacking}", f"it fits with {' '.join(helps)}" if helps else "no flag makes it fit"]
