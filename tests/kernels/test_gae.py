"""gae, rewards_gae and whiten_moments against the recurrence, a token at a time in fp64."""

import math
import os
import tempfile

import kernel_checks
import pytest
import rto_kernels as rk
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import BACKENDS, DEVICE, DTYPES, KINDS, bits, build, check_error, largest, layouts, sample
from launches import forks
from rto_kernels import reference
from rto_kernels._dispatch import INTERPRET, count_launches


def truth(layout, rewards, values, bootstrap, gamma, lam, gaps):
    """(advantages, returns) in fp64: at each inside token, the definition as a sum, with no recurrence.

    "carry": A_t = Σ_k (γλ)^k·δ over the inside tokens from t on. "zero": the same over all positions, r and v
    zeroed outside.
    """
    r, v = rewards.double().reshape(-1).tolist(), values.double().reshape(-1).tolist()
    after = [0.0] * layout.batch if bootstrap is None else bootstrap.double().tolist()
    advantages, returns = [0.0] * len(r), [0.0] * len(r)
    for row, positions in enumerate(layout.rows):
        chosen = set(layout.inside[row])
        walk = positions if gaps == "zero" else layout.inside[row]
        deltas = []
        for k, i in enumerate(walk):
            reward, value = (r[i], v[i]) if i in chosen else (0.0, 0.0)
            ahead = walk[k + 1] if k + 1 < len(walk) else None
            next_value = v[ahead] if ahead in chosen else 0.0
            if layout.inside[row] and i == layout.inside[row][-1]:
                next_value = after[row]
            deltas.append(reward + gamma * next_value - value)
        for k, i in enumerate(walk):
            if i in chosen:
                terms = (deltas[j] * (gamma * lam) ** (j - k) for j in range(k, len(walk)))
                advantages[i] = math.fsum(terms)
                returns[i] = advantages[i] + v[i]
    return [torch.tensor(x, dtype=torch.float64).reshape(layout.shape) for x in (advantages, returns)]


def moments_of(layout, advantages) -> torch.Tensor:
    flat = advantages.double().reshape(-1).tolist()
    inside = [flat[i] for row in layout.inside for i in row]
    mean = math.fsum(inside) / max(len(inside), 1)
    return torch.tensor([len(inside), mean, math.fsum((x - mean) ** 2 for x in inside)], dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    layout=layouts(),
    dtype=st.sampled_from(DTYPES),
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([0.95, 1.0, 0.0]),
    gaps=st.sampled_from(["zero", "carry"]),
    bootstrapped=st.booleans(),
)
def test_equals_the_definition(backend, layout, dtype, gamma, lam, gaps, bootstrapped):
    rewards, values = layout.tokens(dtype), layout.tokens(dtype)
    bootstrap = layout.sequences(dtype) if bootstrapped else None
    kw = {"gamma": gamma, "lam": lam, "gaps": gaps, "bootstrap": bootstrap, **layout.kw}
    with count_launches() as launches:
        out = rk.gae(rewards, values, backend=backend, **kw)
    assert launches == ({"gae": 1} if backend == "triton" and layout.batch else {})
    advantages, returns = truth(layout, rewards, values, bootstrap, gamma, lam, gaps)
    same = reference.gae(rewards, values, **kw)
    scale = largest(rewards, values, bootstrap)
    check_error("advantages", out.advantages, advantages, same.advantages, scale)
    check_error("returns", out.returns, returns, same.returns, scale)
    assert out.advantages.dtype == out.returns.dtype == torch.float32
    assert layout.outside_is_zero(out.advantages, out.returns)
    assert out.moments.dtype == torch.float64
    # The moments are those of the fp32 advantages that came out, to fp64 precision.
    torch.testing.assert_close(out.moments.cpu(), moments_of(layout, out.advantages), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_arrival_counter_is_left_as_it_was_found(backend, module, monkeypatch):
    """On a GPU one counter serves all launches of a stream: a launch that left it dirty would break the next."""
    counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for name in ("gae", "ppo_loss"):
        monkeypatch.setattr(module(name), "arrival_counter", lambda device: counter)
    layout = sample("packed")
    x = [layout.tokens() for _ in range(5)]
    runs = [rk.gae_ppo_loss(*x, **layout.kw, backend=backend) for _ in range(3)]
    assert counter.item() == 0
    for loss, estimate in runs[1:]:
        assert bits(*estimate, *loss[:2], *loss.stats) == bits(*runs[0][1], *runs[0][0][:2], *runs[0][0].stats)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gaps", ["zero", "carry"])
def test_a_gap_of_whole_blocks(backend, gaps):
    layout = build("gaps", [0, 0, 0], 70, 0)  # the gap spans 14 to 56 in sequences 0 and 2
    rewards, values, bootstrap = layout.tokens(), layout.tokens(), layout.sequences()
    out = rk.gae(rewards, values, bootstrap=bootstrap, gaps=gaps, mask=layout.mask, backend=backend)
    advantages, returns = truth(layout, rewards, values, bootstrap, 1.0, 0.95, gaps)
    torch.testing.assert_close(out.advantages.cpu().double(), advantages, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.returns.cpu().double(), returns, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gaps", ["zero", "carry"])
@pytest.mark.parametrize("kind", KINDS)
def test_rewards_gae_is_both_in_one_launch(backend, kind, gaps):
    layout = sample(kind)
    logps, scores, values = [layout.tokens() for _ in range(4)], layout.sequences(), layout.tokens()
    betas = {"beta1": 0.3, "beta2": 0.2, "dpo_clip": 0.4, "dpo_ref_logp": logps[3]}
    kw = {"gamma": 0.99, "gaps": gaps, "bootstrap": layout.sequences(), **layout.kw, "backend": backend}
    with count_launches() as launches:
        tokens, estimate = rk.rewards_gae(*logps[:3], scores, values, **betas, **kw)
    assert launches == ({"rewards_gae": 1} if backend == "triton" else {})
    apart = rk.token_rewards(*logps[:3], scores, **betas, **layout.kw, backend=backend)
    assert bits(*tokens) == bits(*apart)
    assert bits(*estimate) == bits(*rk.gae(apart.rewards, values, **kw))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_every_time_and_alone(backend, kind):
    layout = sample(kind)
    rewards, values, bootstrap = layout.tokens(), layout.tokens(), layout.sequences()
    first, second = (rk.gae(rewards, values, bootstrap=bootstrap, **layout.kw, backend=backend) for _ in range(2))
    assert bits(*first) == bits(*second)
    for row, positions in enumerate(layout.rows):
        at = torch.tensor(positions, dtype=torch.long, device=DEVICE)
        mask = None if layout.mask is None else layout.mask.reshape(-1)[at][None]
        r, v = rewards.reshape(-1)[at][None], values.reshape(-1)[at][None]
        one = rk.gae(r, v, bootstrap=bootstrap[row : row + 1], mask=mask, backend=backend)
        assert bits(one.advantages, one.returns) == bits(
            *(x.reshape(-1)[at] for x in (first.advantages, first.returns))
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_no_bit(backend):
    packed = sample("packed")
    rewards, values = packed.tokens(), packed.tokens()
    expected = rk.gae(rewards, values, cu_seqlens=packed.cu_seqlens, backend=backend)
    lengths = [len(row) for row in packed.rows]
    mask = (torch.arange(50) < torch.tensor(lengths)[:, None]).to(DEVICE)
    padded = [torch.full((5, 50), float("nan"), device=DEVICE).masked_scatter(mask, x) for x in (rewards, values)]
    for gaps in ("zero", "carry"):
        got = rk.gae(*padded, mask=mask, gaps=gaps, backend=backend)
        assert bits(got.advantages[mask], got.returns[mask], got.moments) == bits(*expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fully_masked_and_empty(backend):
    values = torch.full((3, 5), float("nan"), device=DEVICE)
    out = rk.gae(values, values, mask=torch.zeros(3, 5, device=DEVICE), backend=backend)
    assert (out.advantages == 0).all()
    assert out.moments.tolist() == [0, 0, 0]
    none = torch.empty(0, device=DEVICE)
    for cu_seqlens in (torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)):
        out = rk.gae(none, none, cu_seqlens=cu_seqlens.to(DEVICE), backend=backend)
        assert out.moments.tolist() == [0, 0, 0]
        assert out.advantages.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["packed", "gaps"])
def test_operators(backend, kind):
    layout = sample(kind)
    x = [layout.tokens().nan_to_num() for _ in range(4)]
    tail = (layout.cu_seqlens, layout.mask)
    torch.library.opcheck(torch.ops.rto_kernels.gae, (*x[:2], layout.sequences(), *tail, 1.0, 0.95, "carry", backend))
    torch.library.opcheck(
        torch.ops.rto_kernels.rewards_gae,
        (
            *x[:3],
            None,
            layout.sequences(),
            x[3],
            None,
            *tail,
            0.1,
            0.2,
            1.0,
            0.05,
            10.0,
            1.0,
            0.95,
            "zero",
            backend,
        ),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend):
    layout = sample("packed")

    def caller(rewards, values, cu_seqlens):
        out = rk.gae(rewards * 2, values, cu_seqlens=cu_seqlens, backend=backend)
        mean, rstd = rk.whiten_moments(out.moments)
        return (out.advantages - mean) * rstd

    args = (layout.tokens(), layout.tokens(), layout.cu_seqlens)
    compiled = torch.compile(caller, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), caller(*args))


def test_fp64_stays_fp64_on_the_pytorch_path():
    layout = sample("gaps")
    rewards, values = layout.tokens(torch.float64), layout.tokens(torch.float64)
    for gaps in ("zero", "carry"):
        out = rk.gae(rewards, values, mask=layout.mask, gaps=gaps, backend="torch")
        expected = truth(layout, rewards, values, None, 1.0, 0.95, gaps)
        torch.testing.assert_close(out.advantages.cpu(), expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("correction", [0, 1])
def test_whiten_moments_merges_parts(correction):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, dtype=torch.float64, generator=generator) * 3 + 5 for n in (7, 0, 1, 40)]
    spreads = [[len(p), float(p.mean()), float(p.var(correction=0)) * len(p)] if len(p) else [0] * 3 for p in parts]
    rows = torch.tensor(spreads, dtype=torch.float64)
    mean, rstd = rk.whiten_moments(rows, correction=correction)
    whole = torch.cat(parts)
    torch.testing.assert_close(mean, whole.mean(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(rstd, whole.var(correction=correction).rsqrt(), rtol=1e-13, atol=1e-13)
    twin = reference.whiten_moments(rows, correction=correction)
    torch.testing.assert_close((mean, rstd), twin, rtol=1e-13, atol=1e-13)


def test_whitening_nothing_or_a_constant_stays_finite():
    for moments in ([0.0, 0.0, 0.0], [1.0, 3.0, 0.0], [5.0, 3.0, 0.0]):
        mean, rstd = rk.whiten_moments(torch.tensor(moments, dtype=torch.float64), correction=1)
        assert mean == moments[1]
        torch.testing.assert_close(rstd, torch.tensor(1e4, dtype=torch.float64))


def whiten_on_a_rank(rank: int, ranks: int, store: str, folder: str) -> None:
    kernel_checks.DEVICE = "cpu"  # gloo's
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    layout = sample("packed", seed=rank)
    if rank == 1:  # a rank whose micro-batch has no response token
        layout = sample("packed", seed=rank)
        layout.cu_seqlens = torch.zeros(4, dtype=torch.int32)
        layout.shape = (0,)
    x = [layout.tokens() for _ in range(4)]
    group = dist.group.WORLD
    loss, estimate = rk.gae_ppo_loss(*x, group=group, cu_seqlens=layout.cu_seqlens, denominator=8.0)
    torch.save(
        {
            "whiten": rk.whiten_moments(estimate.moments, group),
            "advantages": estimate.advantages,
            "apart": rk.ppo_loss(
                x[0], x[1], estimate.advantages, whiten=rk.whiten_moments(estimate.moments, group),
                cu_seqlens=layout.cu_seqlens, denominator=8.0,
            ).policy_loss,
            "loss": loss.policy_loss,
        },
        f"{folder}/{rank}.pt",
    )  # fmt: skip
    dist.destroy_process_group()


@pytest.mark.skipif(INTERPRET, reason="communication does not depend on the backend; runs without TRITON_INTERPRET")
def test_whitening_over_ranks():
    with tempfile.TemporaryDirectory() as folder:
        forks()  # the server that start_processes will find
        args = (3, os.path.join(folder, "store"), folder)
        mp.start_processes(whiten_on_a_rank, args, nprocs=3, start_method="forkserver")
        ranks = [torch.load(f"{folder}/{rank}.pt") for rank in range(3)]
    everything = torch.cat([r["advantages"] for r in ranks]).double()
    for rank in ranks:
        assert bits(*rank["whiten"]) == bits(*ranks[0]["whiten"])
        assert bits(rank["loss"]) == bits(rank["apart"])
    torch.testing.assert_close(ranks[0]["whiten"][0], everything.mean(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ranks[0]["whiten"][1], everything.var(correction=0).rsqrt(), rtol=1e-12, atol=1e-12)
