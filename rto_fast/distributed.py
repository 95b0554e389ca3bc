"""Ranks, devices and the few collectives that the loop needs."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

if not torch.accelerator.is_available():  # else DeepSpeed looks for one and warns
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator

# A long generation on one rank must not trip the others' collectives.
TIMEOUT = timedelta(hours=4)


def init() -> torch.device:
    """Joins the process group (a launch without `deepspeed` is one rank) and returns this rank's device."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    elif not dist.is_initialized() and (above := launchers()):
        threading.Thread(target=_ends_with, args=(above,), daemon=True).start()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator = get_accelerator()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // ranks_here()))
    if not dist.is_initialized():
        accelerator.set_device(local_rank)
        # On a CPU DeepSpeed would compile a shared-memory collective first: a minute, and a compiler. gloo does.
        # Looked up as an attribute, the dict would try a compiler on every one of its operators.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
        alone = os.environ["WORLD_SIZE"] == "1" or _meets_on_loopback()
        if alone:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())  # else it listens where the machine's name leads
        deepspeed.init_distributed(timeout=TIMEOUT, verbose=False, init_method=f"{HERE}://" if alone else None)
    return device()


HERE = "rto-here"
"""Scheme of the rendezvous of ranks that are all on this machine."""


def open_store(host: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """A store that listens at the address of `host` alone; port 0 = a free one. DistNetworkError where it cannot.

    TCPStore by itself listens on every interface, whatever its host.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    try:
        listener = socket.create_server(address, family=family)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "")
        raise dist.DistNetworkError(f"port {port} of {host} cannot be listened at: {name} {error}") from error
    with listener:
        port = listener.getsockname()[1]
        return dist.TCPStore(
            host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def loopback() -> str:
    """The name of the loopback interface, which is lo on Linux and lo0 on a Mac."""
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(a.address == "127.0.0.1" for a in addresses)), "lo")


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ranks_here() -> int:
    """Ranks of this launch on this machine: torchrun's variable, or that of DeepSpeed's launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def wait_as_long_everywhere() -> None:
    """Gives the groups that DeepSpeed has made meanwhile the same time as ours; by themselves they have ten minutes.

    A rank may wait longer for another that reads or writes a large checkpoint on a slow file system.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(TIMEOUT, group)


def _meets_on_loopback() -> bool:
    """Whether the ranks' store is to be made by rank 0, at an address of loopback (torchrun keeps its own store)."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return False
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(os.environ["MASTER_ADDR"], None, type=socket.SOCK_STREAM)
        return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)
    return False


def _meet_here(url: str, timeout: timedelta = TIMEOUT, **_: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """(store, rank, ranks) for `init_process_group`; one rank alone opens no port, several open one on loopback."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if ranks == 1:
        yield dist.HashStore(), rank, ranks
    elif rank == 0:
        yield open_store(host, port, timeout), rank, ranks
    else:
        yield dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False), rank, ranks


dist.register_rendezvous_handler(HERE, _meet_here)


LAUNCHERS = ("deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "torch.distributed.launch")
"""How launchers stand in a command line: a script's name, or the module behind -m."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take a machine away."""
LAST_SECONDS = 1800.0
"""What a rank has left to end its step once its launcher is gone."""


def launchers() -> list[psutil.Process]:
    """The launchers above this process."""
    found = []
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if any(Path(word).name in LAUNCHERS for word in process.cmdline()[:6]):
                found.append(process)
    return found


def _ends_with(above: Sequence[psutil.Process]) -> None:
    """SIGTERM to this process when one of `above` is gone, as SIGKILL leaves it; the end where that does not help."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in above):
            time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def device() -> torch.device:
    """This rank's device."""
    return torch.device(get_accelerator().current_device_name())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def speaks() -> bool:
    """Whether this rank reports an error that ends the run: rank 0, once they have met the first one to ask."""
    if world_size() == 1:
        return os.environ.get("RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("rto_fast/speaks", 1) == 1
    except RuntimeError:  # the rank that kept the store has reported and left
        return False


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def hosts() -> list[str]:
    """[rank] -> name of the machine that it runs on, on every rank."""
    return gather_objects(socket.gethostname())


def gather_objects(item: Any) -> list[Any]:
    """[rank] -> item, on every rank."""
    if world_size() == 1:
        return [item]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, item)
    return out


def broadcast_object(item: Any) -> Any:
    """Rank 0's item, on every rank."""
    if world_size() == 1:
        return item
    box = [item]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_over_ranks(values: Tensor) -> Tensor:
    """All-reduced sum, fp64, on the CPU: deterministic for a given number of ranks."""
    total = values.detach().to(device=device(), dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(total)
    return total.cpu()


def gather_ragged(local: Sequence[Tensor], owners: Sequence[Sequence[int]]) -> list[Tensor]:
    """Puts pieces computed on different ranks in their global order, on every rank, on the CPU.

    local: this rank's pieces, 1-D, in the order of owners[rank]; owners[r]: the global indices of rank r's
    pieces; together they cover 0 .. total - 1 once.
    """
    ordered: list[Tensor | None] = [None] * sum(len(o) for o in owners)
    flat = torch.cat(list(local)) if local else torch.empty(0)
    for index, (values, sizes) in zip(owners, gather_objects((flat.cpu(), [t.numel() for t in local])), strict=True):
        for i, piece in zip(index, values.split(sizes), strict=True):
            ordered[i] = piece
    return ordered  # type: ignore[return-value]
