"""The CPU path beside its fastest peer, as it is and as it was at another commit.

    python -m bench.kernels.cpu_ratios --before 0fe14fd

Each commit's kernels are measured in processes of their own, turn by turn; inside one, ours and the peers take turns.
A line says ours over the fastest peer, the median of the turns' ratios, so that a busy machine's drift cancels. Below 1
is faster. Peers: log_softmax with a gather, the eager formula, and torch.compile of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def logits_case(tokens: int, vocab: int) -> dict[str, Callable[[], object]]:
    import rto_kernels as rk
    import torch

    from bench.kernels.peers import compiled, eager_logp, log_softmax_logp

    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(1, tokens, vocab, generator=generator) * 3).requires_grad_()
    targets, up = torch.randint(vocab, (1, tokens), generator=generator), torch.randn(1, tokens, generator=generator)
    found = {"ours": rk.logprobs_from_logits, "log_softmax": log_softmax_logp, "eager": eager_logp}
    found["torch.compile"] = compiled(eager_logp)
    return {
        name: lambda f=f: torch.autograd.grad(f(logits, targets), logits, up)
        for name, f in found.items()
        if f is not None
    }


def ppo_case(batch: int, width: int) -> dict[str, Callable[[], object]]:
    import rto_kernels as rk
    import torch

    from bench.kernels.peers import compiled, eager_ppo

    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(batch, width, generator=generator) * 0.3 for _ in range(6)]
    mask = torch.arange(width) < torch.randint(1, width + 1, (batch, 1), generator=generator)
    x[0].requires_grad_(), x[3].requires_grad_()
    found = {"ours": lambda *x: rk.ppo_loss(*x, mask=mask)[:2], "eager": lambda *x: eager_ppo(*x, mask)}
    if (fused := compiled(eager_ppo)) is not None:
        found["torch.compile"] = lambda *x: fused(*x, mask)

    def run(losses: Callable) -> object:
        return torch.autograd.grad(sum(losses(*x)), (x[0], x[3]))

    return {name: lambda f=f: run(f) for name, f in found.items()}


def head_case(tokens: int, width: int, vocab: int) -> dict[str, Callable[[], object]]:
    import rto_kernels as rk
    import torch

    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, width, generator=generator).requires_grad_()
    w = (torch.randn(vocab, width, generator=generator) / width**0.5).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator)

    def plain(h, w, targets):
        return torch.log_softmax(h @ w.T, 1).gather(1, targets[:, None])[:, 0]

    return {
        name: lambda f=f: torch.autograd.grad(f(h, w, targets).sum(), (h, w))
        for name, f in (("ours", rk.token_logprobs), ("log_softmax", plain))
    }


CASES: dict[str, Callable[[], dict[str, Callable[[], object]]]] = {
    "logprobs_from_logits, N 256, V 8192": lambda: logits_case(256, 8192),
    "logprobs_from_logits, N 1024, V 64000": lambda: logits_case(1024, 64000),
    "ppo_loss, 64 × 512": lambda: ppo_case(64, 512),
    "ppo_loss, 128 × 1024": lambda: ppo_case(128, 1024),
    "token_logprobs, N 1024, H 512, V 64000": lambda: head_case(1024, 512, 64000),
}


def measure(match: str, rounds: int) -> dict[str, dict[str, float]]:
    """Case → {peer: median of (ours / peer)}, with "ms" ours."""
    out = {}
    for case, make in CASES.items():
        if match not in case:
            continue
        contenders = make()
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for job in contenders.values():
            job(), job()  # the first compiles
        for _ in range(rounds):
            for name, job in contenders.items():
                start = time.thread_time()
                job()
                times[name].append(time.thread_time() - start)
        ours = times.pop("ours")
        ratios = {k: statistics.median(a / b for a, b in zip(ours, v, strict=True)) for k, v in times.items()}
        out[case] = {**ratios, "ms": 1e3 * statistics.median(ours)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", help="a commit whose kernels are measured too")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender in a process")
    parser.add_argument("--turns", type=int, default=2, help="processes of each commit")
    parser.add_argument("--here", action="store_true", help="measure in this process, and print JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.match, args.rounds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        kernels = {"now": ROOT / "kernels"}
        if args.before:
            tar = subprocess.run(["git", "archive", args.before, "kernels"], cwd=ROOT, check=True, capture_output=True)
            subprocess.run(["tar", "x", "-C", folder], input=tar.stdout, check=True)
            kernels = {"before": Path(folder) / "kernels"} | kernels
        found: dict[tuple[str, str], list[dict[str, float]]] = {}
        for _ in range(args.turns):
            for when, path in kernels.items():
                env = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
                command = [sys.executable, "-m", "bench.kernels.cpu_ratios", "--here", "--match", args.match]
                command += ["--rounds", str(args.rounds)]
                text = subprocess.run(command, env=env, cwd=folder, check=True, capture_output=True, text=True).stdout
                for case, ratios in json.loads(text.splitlines()[-1]).items():
                    found.setdefault((case, when), []).append(ratios)
    for (case, when), turns in found.items():
        middle = {k: statistics.median(t[k] for t in turns) for k in turns[0]}
        ms = middle.pop("ms")
        peers = ", ".join(f"{k} {v:.2f}" for k, v in middle.items())
        print(f"{case:40} {when:7} {max(middle.values()):.2f} × the fastest ({peers}); {ms:.2f} ms")


if __name__ == "__main__":
    main()
