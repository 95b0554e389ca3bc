"""What only a GPU can show of the kernels, a check after the other, each with what was found.

    python -m bench.kernels.checks            writes run/checks of bench/results/<device>.json
    python -m bench.kernels.checks --small    at sizes for a CPU

    first ratio     scoring and the update's forward pass give the same log-probs to the bit: the first ratio is 1
    host time       microseconds a call as the host sees it, its inputs being there
    launches        kernels a call puts on the device, gradients included
    new sizes       a number of tokens that was not seen before compiles nothing: the longest call in seconds
    strict          every public call under torch.use_deterministic_algorithms(True)
    cuda graph      the token-sized kernels replayed from a graph, on new values
    token_kl        its time beside the matrix products that it cannot do without
    tiles           the tiles in use, looked at as an entry of another Triton is: what their kernels say of themselves,
                    and that a tile which cannot fit is refused

Cross-entropy, fused rewards and the cost against tokens are benches of their own; released weights and
`mode="reduce-overhead"` are in tests/kernels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import rto_kernels as rk
import torch
from rto_kernels import tile_check, tiles
from rto_kernels._dispatch import count_launches
from torch import Tensor

from bench.harness import DEVICE, ON_GPU, RUN, commit, on_device, resumed, save, seconds, source
from bench.kernels.determinism import cases

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
NEW_SIZE_S = 0.5
"""A call that takes longer on a new number of tokens has compiled something."""
KL_PRODUCTS = 2.0
"""The most that token_kl may take, in the time of the matrix products of its two heads."""


def shape(small: bool) -> tuple[int, int, int]:
    """(tokens, hidden, vocabulary)."""
    return (70, 64, 1003) if small else (4096, 4096, 128256)


def head(tokens: int, hidden: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    random = source()
    h = torch.randn(tokens, hidden, **random).to(DTYPE).requires_grad_()
    w = (torch.randn(vocab, hidden, **random) * 2 / hidden**0.5).to(DTYPE).requires_grad_()
    return h, w, torch.randint(vocab, (tokens,), **random)


def first_ratio(small: bool) -> dict:
    tokens, hidden, vocab = shape(small)
    h, w, targets = head(tokens, hidden, vocab)
    with torch.no_grad():
        scored = rk.token_logprobs(h, w, targets)
    ends = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32, device=DEVICE)
    ones = torch.ones_like(scored)
    updated = rk.fused_linear_ppo_loss(h, w, targets, scored, ones, cu_seqlens=ends).logp
    far = float(((updated - scored).double().exp() - 1).abs().max())
    return {"ok": torch.equal(updated, scored), "largest |ratio - 1|": far}


def calls(small: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """The token-sized kernels as an iteration calls them, and a head of a few tokens."""
    batch, width = (5, 70) if small else (128, 1024)
    random = source()
    a, b, c, values = (torch.randn(batch, width, **random) * 0.3 for _ in range(4))
    scores, mask = torch.randn(batch, **random), torch.ones(batch, width, dtype=torch.bool, device=DEVICE)
    leaf, value_leaf = (x.clone().requires_grad_() for x in (a, values))
    betas = {"beta1": 0.05, "beta2": 0.01, "dpo_clip": 0.05}
    h, w, targets = head(64, 64, 1003)

    def loss() -> None:
        out = rk.ppo_loss(leaf, b, c, value_leaf, values, a, mask=mask)
        torch.autograd.grad(out.policy_loss + out.value_loss, (leaf, value_leaf))

    def policy_loss() -> None:
        torch.autograd.grad(rk.ppo_loss(leaf, b, c, mask=mask).policy_loss, leaf)

    yield "token_rewards", lambda: rk.token_rewards(a, b, c, scores, mask=mask, **betas)
    yield "gae", lambda: rk.gae(a, values, mask=mask)
    yield "rewards_gae", lambda: rk.rewards_gae(a, b, c, scores, values, mask=mask, **betas)
    yield "ppo_loss, policy and value, with gradients", loss
    yield "ppo_loss, policy, with gradients", policy_loss
    yield "token_logprobs, 64 tokens, no gradient", lambda: rk.token_logprobs(h.detach(), w.detach(), targets)


def host_us(call: Callable[[], object], repeats: int) -> float:
    """Median microseconds until the call returns; the device is idle before each."""
    times = []
    for _ in range(repeats):
        if ON_GPU:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def host_time(small: bool) -> dict:
    found = {}
    for name, call in calls(small):
        call()
        found[name] = round(host_us(call, 3 if small else 200), 1)
    return {"ok": True, "microseconds": found}


def launches(small: bool) -> dict:
    found = {}
    for name, call in calls(small):
        call()
        with count_launches() as ours:
            call()
        found[name] = {"ours": dict(ours), "all on the device": on_device(call).get("launches")}
    return {"ok": True, "launches": found}


def new_sizes(small: bool) -> dict:
    _, hidden, vocab = shape(small)
    longest = {}
    for tokens in (256, 255, 17, 1, 300, 301):
        h, w, targets = head(tokens, hidden, vocab)
        row = torch.zeros(tokens, device=DEVICE)
        ends = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
        start = time.perf_counter()
        rk.fused_linear_ppo_loss(h, w, targets, row, row, cu_seqlens=ends).policy_loss.backward()
        rk.token_logprobs(h, w, targets).sum().backward()
        if ON_GPU:
            torch.cuda.synchronize()
        longest[str(tokens)] = round(time.perf_counter() - start, 4)
    return {"ok": all(s < NEW_SIZE_S for s in list(longest.values())[1:]), "seconds": longest}


def strict(small: bool) -> dict:
    refused = {}
    torch.use_deterministic_algorithms(True)
    try:
        for name, case in cases(True):
            try:
                case()
            except RuntimeError as error:
                refused[name] = str(error).splitlines()[0][:200]
    finally:
        torch.use_deterministic_algorithms(False)
    return {"ok": not refused, "refused": refused}


def cuda_graph(small: bool) -> dict:
    if not ON_GPU:
        return {"ok": True, "not run": "there are no CUDA graphs on a CPU"}
    rewards, values = torch.randn(2, 128, 1024, **source())
    for _ in range(2):
        rk.gae(rewards, values)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rk.gae(rewards, values)
    same = []
    for seed in range(1, 6):
        rewards.copy_(torch.randn(128, 1024, **source(seed)))
        graph.replay()
        same.append(torch.equal(out.advantages, rk.gae(rewards, values).advantages))
    return {"ok": all(same), "replays alike": sum(same), "replays": len(same)}


def token_kl(small: bool) -> dict:
    tokens, hidden, vocab = shape(small)
    h, w, _ = head(tokens if small else tokens // 4, hidden, vocab)
    other = (w.detach() * 0.9).contiguous()
    h, w = h.detach(), w.detach()
    rounds = 2 if small else 10
    for job in (ours := lambda: rk.token_kl(h, w, h, other)), (products := lambda: (h @ w.T, h @ other.T)):
        job()
    ms = {
        name: 1e3 * statistics.median(seconds(job) for _ in range(rounds))
        for name, job in (("token_kl", ours), ("two products", products))
    }
    ratio = ms["token_kl"] / ms["two products"]
    return {"ok": not ON_GPU or ratio <= KL_PRODUCTS, "ms": ms, "ratio": ratio}


def tiles_looked_at(small: bool) -> dict:
    if not ON_GPU:
        return {"ok": True, "not run": "kernels are compiled for a GPU"}
    _, hidden, vocab = shape(small)
    device = torch.device(DEVICE, torch.cuda.current_device())
    problem = tiles.problem_of(hidden, vocab, 2, device)
    used = tiles.choose(problem, device)
    # Seven stages of 128 × 256 tiles are more than any chip's shared memory.
    vast = used._replace(plain=tiles.Tile(128, 256, 64, 8, 7))
    kernels = [tile_check.compiled(launch, device)._asdict() for launch in tile_check.launches(used, problem)]
    refused = {
        name: tile_check.objection_to(choice, problem, device) for name, choice in (("used", used), ("vast", vast))
    }
    return {"ok": not refused["used"] and bool(refused["vast"]), "objections": refused, "kernels": kernels}


CHECKS = {
    "first ratio": first_ratio,
    "strict": strict,
    "cuda graph": cuda_graph,
    "tiles": tiles_looked_at,
    "new sizes": new_sizes,
    "launches": launches,
    "host time": host_time,
    "token_kl": token_kl,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    args = parser.parse_args()
    found = dict(resumed("checks"))
    for name, check in CHECKS.items():
        if name not in found:
            try:
                found[name] = check(args.small)
            except Exception as error:  # one that breaks must not keep the others from being made
                found[name] = {"ok": False, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            found[name]["commit"] = commit()
            save(RUN, "checks", found)
        print(f"{name:12} {'ok' if found[name]['ok'] else 'FAILED'}  {found[name]}", flush=True)
    if wrong := [name for name, record in found.items() if not record["ok"]]:
        sys.exit(f"failed: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
