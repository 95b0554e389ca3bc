"""Send named tensors from the trainer to engines in other processes.

A broadcast in buckets, over a group of its own.

A bucket is three broadcasts: its sizes, its table of contents (JSON) and its bytes. While one travels, the sender
gathers the next: two buckets at most are held there, one at a receiver. A bucket is at least one tensor.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ALIGNMENT = 16
"""Bytes that every tensor of a bucket starts at a multiple of: any dtype can be viewed there."""
_END, _ABANDONED = 0, -1
"""In place of the table's size: no bucket follows; the sender failed."""
_POLL_S = 0.0005


class Abandoned(RuntimeError):
    """The sender stopped in the middle of a set of weights."""


def own_address(peer: str) -> str:
    """The address by which `peer` (a host name or address) can reach this machine."""
    family, kind, _, _, address = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as s:
        s.connect(address)  # chooses the interface; nothing is sent
        return s.getsockname()[0]


def open_file(path: str, size: int, timeout_s: float) -> dist.FileStore:
    """A store for `size` processes of this machine, in a file that is made where there is none."""
    store = dist.FileStore(path, size)
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def join(store: dist.Store, rank: int, size: int, device: torch.device, address: str, timeout_s: float) -> Any:
    """The group of the sender (rank 0) and its receivers: NCCL between CUDA devices, else gloo. Waits for all.

    address: this end's own, that gloo listens at.
    """
    timeout = timedelta(seconds=timeout_s)
    own = dist.PrefixStore("weights", store)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(own, rank, size, options)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    return dist.ProcessGroupGloo(own, rank, size, options)


def send(
    group: Any, weights: Iterable[tuple[str, Tensor]], device: torch.device, bucket_bytes: int,
    watch: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Broadcasts (name, tensor) pairs; a tensor is not looked at again once the next one was asked for.

    watch: called while a broadcast travels; raises where it cannot arrive any more. An error of `weights` reaches the
    receivers as Abandoned, and the caller as it is.
    """
    travelling: list[tuple[Any, Tensor]] = []

    def arrive() -> None:
        for work, _ in travelling:
            while not work.is_completed():
                watch()
                time.sleep(_POLL_S)
            work.wait()
        travelling.clear()

    def start(*tensors: Tensor) -> None:
        arrive()
        travelling.extend((group.broadcast(t, 0), t) for t in tensors)

    def sizes(table: int, data: int = 0) -> Tensor:
        return torch.tensor([table, data], device=device)

    buckets = _buckets(weights, device, bucket_bytes)
    while True:
        try:
            bucket = next(buckets, None)
        except BaseException:
            start(sizes(_ABANDONED))
            arrive()
            raise
        if bucket is None:
            break
        contents, data = bucket
        table = torch.frombuffer(bytearray(json.dumps(contents).encode()), dtype=torch.uint8).to(device)
        start(sizes(table.numel(), data.numel()), table, data)
    start(sizes(_END))
    arrive()


def receive(group: Any, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The pairs of one `send`; the tensors are the receiver's own. Raises Abandoned where the sender failed."""
    while True:
        sizes = torch.zeros(2, dtype=torch.int64, device=device)
        group.broadcast(sizes, 0).wait()
        table_bytes, data_bytes = sizes.tolist()
        if table_bytes == _END:
            return
        if table_bytes == _ABANDONED:
            raise Abandoned("the trainer stopped in the middle of a push")
        table, data = (torch.empty(n, dtype=torch.uint8, device=device) for n in (table_bytes, data_bytes))
        for work in [group.broadcast(table, 0), group.broadcast(data, 0)]:
            work.wait()
        for name, dtype, shape, start in json.loads(bytes(table.tolist())):
            kind = getattr(torch, dtype)
            yield name, data[start : start + math.prod(shape) * kind.itemsize].view(kind).view(shape)


def _buckets(
    weights: Iterable[tuple[str, Tensor]], device: torch.device, bucket_bytes: int
) -> Iterator[tuple[list[tuple[str, str, list[int], int]], Tensor]]:
    """(table of contents, bytes) of one bucket after the other."""
    contents: list[tuple[str, str, list[int], int]] = []
    data = torch.empty(0, dtype=torch.uint8, device=device)
    used = 0
    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if contents and used + size > bucket_bytes:
            yield contents, data[:used]
            contents, used = [], 0
        if not contents:
            data = torch.empty(max(size, bucket_bytes) + _ALIGNMENT, dtype=torch.uint8, device=device)
        data[used : used + size] = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        contents.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), used))
        used += -(-size // _ALIGNMENT) * _ALIGNMENT
    if contents:
        yield contents, data[: min(used, data.numel())]
