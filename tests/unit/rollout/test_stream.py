"""Named tensors over gloo to another process: every dtype and shape, in buckets, and a sender that fails."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from launches import forks

from rto_fast.distributed import open_store
from rto_fast.rollout.weights.stream import Abandoned, join, open_file, own_address, receive, send

CPU = torch.device("cpu")
WEIGHTS = {
    "matrix": torch.randn(33, 65, generator=torch.Generator().manual_seed(0)),
    "odd": torch.arange(7).bfloat16(),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "turned": torch.arange(12).reshape(3, 4).T,
}


def receiver(place: int | str, sets: int, out) -> None:
    """place: where it meets the sender, a port or a file."""
    if isinstance(place, int):
        store = dist.TCPStore("127.0.0.1", place, is_master=False, wait_for_workers=False)
    else:
        store = open_file(place, 2, 60)
    group = join(store, 1, 2, CPU, "127.0.0.1", 60)
    for _ in range(sets):
        got = []
        try:
            for name, tensor in receive(group, CPU):
                got.append((name, str(tensor.dtype), tensor.tolist()))
        except Abandoned as error:
            got.append(str(error))
        out.put(got)


@pytest.fixture(params=["port", "file"])
def sender(request, tmp_path):
    """start(sets) -> (group, queue of what the other process received)."""
    context, started = forks(), []

    def start(sets: int):
        out = context.Queue()
        if request.param == "port":
            store = open_store("127.0.0.1", 0, timedelta(seconds=60))
            place = store.port
        else:
            place = str(tmp_path / "weights")
            store = open_file(place, 2, 60)
        started.append(context.Process(target=receiver, args=(place, sets, out)))
        started[-1].start()
        return join(store, 0, 2, CPU, own_address("127.0.0.1"), 60), out

    yield start
    for process in started:
        process.kill()
        process.join()


def test_everything_arrives_in_buckets_of_any_size(sender):
    sizes = (1, 100, 9000, 1 << 20)
    group, out = sender(len(sizes))
    for size in sizes:
        send(group, WEIGHTS.items(), CPU, size)
        assert out.get(timeout=60) == [(n, str(t.dtype), t.tolist()) for n, t in WEIGHTS.items()]


def test_one_buffer_may_hold_every_tensor_in_turn(sender):
    """As ZeRO-3 gathers them: a tensor is gone once the next one is asked for."""
    buffer = torch.zeros(4)

    def weights():
        for value in range(5):
            buffer.fill_(value)
            yield f"w{value}", buffer
        buffer.fill_(-1)

    group, out = sender(1)
    send(group, weights(), CPU, 32)
    assert [pair[2] for pair in out.get(timeout=60)] == [[float(v)] * 4 for v in range(5)]


def test_a_sender_that_fails_in_the_middle(sender):
    def weights():
        yield "matrix", WEIGHTS["matrix"]
        yield "odd", WEIGHTS["odd"]
        raise ValueError("gone")

    group, out = sender(2)
    with pytest.raises(ValueError, match="gone"):
        send(group, weights(), CPU, 100)
    assert out.get(timeout=60)[-1] == "the trainer stopped in the middle of a push"
    send(group, WEIGHTS.items(), CPU, 100)
    assert len(out.get(timeout=60)) == len(WEIGHTS)


def test_a_receiver_that_dies_is_noticed(sender):
    group, _ = sender(0)

    def watch() -> None:
        raise ConnectionError("the receiver is dead")

    with pytest.raises((RuntimeError, ConnectionError)):
        send(group, ((str(i), torch.zeros(1 << 20)) for i in range(64)), CPU, 1 << 20, watch)
