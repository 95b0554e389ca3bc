"""What ranks of one machine open to others: nothing."""

from __future__ import annotations

import json
import os
import textwrap
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist

from rto_fast import distributed
from rto_fast.distributed import open_store

RANK = """
    import json, os, psutil, torch
    import torch.distributed as dist
    from rto_fast import distributed

    distributed.init()
    total = distributed.sum_over_ranks(torch.ones(1)).item()
    store = dist.distributed_c10d._get_default_store()
    store.add("ranks", 1)
    distributed.barrier()
    found = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"]
    print(json.dumps([total, store.get("ranks").decode(), [list(a) for a in found]]), flush=True)
    distributed.barrier()
    os._exit(0)
"""


def listening() -> set[tuple[str, int]]:
    """(address, port) of every socket that this process listens at."""
    return {tuple(c.laddr) for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"}


def test_a_store_listens_at_its_own_address_alone():
    before = listening()
    store = open_store("127.0.0.1", 0, timedelta(seconds=5))
    assert listening() - before == {("127.0.0.1", store.port)}
    dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False).set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(dist.DistNetworkError, match=f"port {store.port} of 127.0.0.1 .*: EADDRINUSE"):
        open_store("127.0.0.1", store.port, timedelta(seconds=5))


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_of_one_machine_listen_on_loopback_alone(launch, tmp_path, ranks):
    (tmp_path / "rank.py").write_text(textwrap.dedent(RANK))
    result = launch([tmp_path / "rank.py"], ranks=ranks)
    assert result.returncode == 0, result.output
    lines = [json.loads(line) for line in result.output.splitlines() if line.startswith("[")]
    assert [line[:2] for line in lines] == [[ranks, str(ranks)]] * ranks
    assert {address for line in lines for address, _ in line[2]} <= {"127.0.0.1", "::1"}, lines


def test_a_mac_names_its_loopback_and_its_processors_otherwise(monkeypatch):
    mac = {"en0": [SimpleNamespace(address="192.168.1.2")], "lo0": [SimpleNamespace(address="127.0.0.1")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: mac)
    assert distributed.loopback() == "lo0"
    monkeypatch.delattr(os, "sched_getaffinity")
    assert distributed.cores() == os.cpu_count()


def test_one_rank_without_a_launcher_keeps_its_store_to_itself(one_rank):
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, dist.HashStore)


@pytest.mark.parametrize(
    ("given", "threads"),
    [({"LOCAL_WORLD_SIZE": "4"}, 3), ({"LOCAL_SIZE": "4"}, 3), ({"LOCAL_SIZE": "64"}, 1), ({}, 12),
     ({"LOCAL_SIZE": "4", "OMP_NUM_THREADS": "7"}, 0)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_ranks_of_a_machine_share_its_processors(one_rank, monkeypatch, given, threads, kind):
    """With torchrun and with DeepSpeed's launcher, on GPUs too; 0: the user's number stands."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(distributed, "cores", lambda: 12)
    monkeypatch.setattr(distributed.torch, "set_num_threads", asked.append)
    monkeypatch.setattr(type(distributed.get_accelerator()), "device_name", lambda self, index=None: kind)
    distributed.init()
    assert asked == ([threads] if threads else [])


def test_groups_that_are_made_later_wait_as_long(one_rank):
    group = dist.new_group([0])
    backend = group._get_backend(one_rank)
    assert backend.options._timeout < distributed.TIMEOUT
    distributed.wait_as_long_everywhere()
    assert backend.options._timeout == distributed.TIMEOUT
