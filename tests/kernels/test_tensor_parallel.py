"""token_logprobs with the vocabulary split over gloo ranks, and weights that are not whole on this rank."""

import itertools
import os
import tempfile
from types import SimpleNamespace

import pytest
import rto_kernels as rk
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from kernel_checks import BACKENDS, bits
from launches import forks
from rto_kernels._dispatch import INTERPRET
from test_confident_tokens import check_rows, eager, exact, gradients, sure_problem

N, WIDTH, VOCAB = 13, 8, 50


def inputs(dtype):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=g).to(dtype) for s in ((N, WIDTH), (VOCAB, WIDTH), (VOCAB,)))
    targets = torch.randint(0, VOCAB, (N,), generator=g)
    targets[3] = -100
    upstream = torch.randn(2, N, generator=g)
    return hidden, weight, bias, targets, upstream


def run(hidden, weight, bias, targets, upstream, **kw):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logp, entropy = rk.token_logprobs(*leaves[:2], targets, bias=leaves[2], temperature=0.8, return_entropy=True, **kw)
    loss = (torch.stack([logp, entropy]) * upstream).sum()
    return [logp.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)]


def in_process_group(rank, world, path, body, *args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    try:
        body(rank, world, *args)
    finally:
        dist.destroy_process_group()


def spawn(world, body, *args):
    with tempfile.TemporaryDirectory() as folder:
        forks()  # the server that start_processes will find
        args = (world, os.path.join(folder, "store"), body, *args)
        mp.start_processes(in_process_group, args, nprocs=world, start_method="forkserver")


def splits(world):
    """Uneven shards: (first, one past the last) of each rank."""
    ends = [0, *[7 + 17 * i for i in range(world - 1)], VOCAB]
    return list(itertools.pairwise(ends))


def equals_one_rank(rank, world, backend):
    group = dist.group.WORLD
    start, end = splits(world)[rank]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for save in (False, dtype == torch.bfloat16):
            hidden, weight, bias, targets, upstream = inputs(dtype)
            whole = run(hidden, weight, bias, targets, upstream, backend=backend)
            shard = weight[start:end].contiguous(), bias[start:end].contiguous()
            kw = {"process_group": group, "backend": backend, "save_probs": save}
            got = run(hidden, *shard, targets, upstream, vocab_start=start, **kw)
            whole[3], whole[4] = whole[3][start:end], whole[4][start:end]
            for a, b in zip(got, whole, strict=True):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(got[0], whole[0], rtol=1e-5, atol=1e-5)
            found = run(hidden, *shard, targets, upstream, **kw)  # vocab_start found by the ranks themselves
            assert bits(*found) == bits(*got)
            for x in got[:3]:  # every rank has the same bits of logp, entropy and d(hidden)
                ranks = [torch.empty_like(x) for _ in range(world)]
                dist.all_gather(ranks, x.contiguous())
                assert all(bits(r) == bits(x) for r in ranks)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", [2, 3])
def test_shards_equal_one_rank(backend, world):
    if backend == "triton" and not INTERPRET:
        pytest.skip("gloo ranks hold CPU tensors")
    spawn(world, equals_one_rank, backend)


def sure_tokens(rank, world, backend, dtype):
    """Gradients of targets with p up to 1 − 1e-6, whose 1 − p the merge of shards must not lose."""
    hidden, weight, targets, upstream = sure_problem(dtype)
    first, last = [(0, 7), (7, len(weight))][rank]
    truth = gradients(exact(targets), hidden.double(), weight.double(), upstream)
    plain = gradients(eager(targets), hidden, weight, upstream)
    kw = {"process_group": dist.group.WORLD, "vocab_start": first, "backend": backend}
    got = gradients(
        lambda h, w: rk.token_logprobs(h, w, targets, **kw), hidden, weight[first:last].contiguous(), upstream
    )
    check_rows("d(hidden)", got[0], truth[0], plain[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shards_keep_the_gradients_of_sure_tokens(backend, dtype):
    if backend == "triton" and not INTERPRET:
        pytest.skip("gloo ranks hold CPU tensors")
    spawn(2, sure_tokens, backend, dtype)


def gathers_a_dtensor(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, weight, bias, targets, upstream = inputs(torch.float32)
    mesh = init_device_mesh("cpu", (world,))
    split = distribute_tensor(weight, mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"weight is a DTensor.*full_tensor\(\)"):
        rk.token_logprobs(hidden, split, targets)
    gathered = run(hidden, split.full_tensor(), bias, targets, upstream)
    assert bits(*gathered) == bits(*run(hidden, weight, bias, targets, upstream))


@pytest.mark.skipif(INTERPRET, reason="runs without TRITON_INTERPRET")
def test_a_dtensor_is_refused_and_works_when_gathered():
    spawn(2, gathers_a_dtensor)


@pytest.mark.skipif(INTERPRET, reason="runs without TRITON_INTERPRET")
def test_a_zero3_partitioned_weight_is_refused():
    hidden, _, _, targets, _ = inputs(torch.float32)
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id, weight.ds_numel, weight.ds_shape = 7, VOCAB * WIDTH, torch.Size([VOCAB, WIDTH])
    weight.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
    with pytest.raises(ValueError, match=r"weight is a ZeRO-3 partition.*GatheredParameters"):
        rk.token_logprobs(hidden, weight, targets)
