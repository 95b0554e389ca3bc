"""Measures tiles for one lm_head on this GPU, and writes the fastest where `tiles.choose` looks for them.

    python -m rto_kernels.tune --hidden 4096 --vocab 128256 --dtype bfloat16

Each of `Tiles`' four is climbed by itself: every neighbour of the best so far (one field, one step) runs the pass
that the tile is for, against the same inputs, until none is faster by MARGIN. A neighbour that does not compile, does
not fit, or whose results differ from the defaults' by more than rounding is left out and named. Nothing else on the
GPU may run meanwhile.

Other tiles add up in another order: results move by rounding, for processes that start afterwards.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import tiles
from ._dispatch import INTERPRET
from ._vocab_torch import Head
from .linear_backward import linear_backward_triton
from .linear_forward import linear_forward_triton, tiles_of
from .linear_logprob import kept_dtype
from .tiles import Tile, Tiles, allowed

STEPS = {
    "rows": (16, 64, 128, 256),
    "columns": (32, 64, 128, 256),
    "depth": (16, 32, 64, 128),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4, 5),
    "parts": (1, 2),
}
MARGIN = 0.01
"""A neighbour must be this much faster: less is within what a repetition moves."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}
"""Largest relative difference (Frobenius) from the default tiles' results."""

Job = Callable[[], list[Tensor]]


def neighbours(tile: Tile) -> Iterator[Tile]:
    for field, steps in STEPS.items():
        here = steps.index(getattr(tile, field))
        for there in (here - 1, here + 1):
            if 0 <= there < len(steps):
                yield tile._replace(**{field: steps[there]})


def jobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Job]:
    """For each field of Tiles a pass that runs on it, and gives its results."""
    head = Head(weight, None, 1.0, 0.0)
    # A soft-cap far above the logits changes nothing but the kernel.
    full = head._replace(softcap=1e4)
    stats = linear_forward_triton(hidden, targets, head, -100)
    g = torch.randn(targets.shape, generator=torch.Generator(hidden.device).manual_seed(1), device=hidden.device)

    def forward() -> list[Tensor]:
        return [linear_forward_triton(hidden, targets, head, -100).logp]

    def saving() -> list[Tensor]:
        # What is kept goes by the tile's own shifts: only the log-probs can be compared.
        return [linear_forward_triton(hidden, targets, head, -100, False, kept_dtype(hidden)).logp]

    def backward(head: Head) -> list[Tensor]:
        grads = linear_backward_triton(hidden, targets, head, stats, g, None, (True, True, False))
        return [grads.hidden, grads.weight]

    return {
        "plain": forward,
        "saving": saving,
        "full": lambda: backward(full),
        "product": lambda: backward(head),
    }


def milliseconds(job: Job, device: torch.device, repeats: int = 7) -> float:
    """Median of `repeats` calls after one that compiles."""
    job()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        job()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference of a result; NaN counts as infinite."""
    pairs = zip(got, expected, strict=True)
    found = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]
    return max(x if x == x else float("inf") for x in found)


def tune(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    minutes: float = 5.0,
    measure: Callable[[Job, torch.device], float] = milliseconds,
    say: Callable[[str], None] = print,
) -> Tiles:
    """The fastest tiles found within `minutes` for hidden [N, H], weight [V, H] and targets [N] on their device.

    Starts from what `tiles.choose` gives. The number of tokens is the measurement's alone: a choice holds for all.
    """
    end = time.monotonic() + 60 * minutes
    best = tiles_of(hidden, weight.shape[0])[1]
    for role, job in jobs(hidden, weight, targets).items():
        with tiles.trying(best):
            expected, fastest = job(), measure(job, hidden.device)
        say(f"{role}: {getattr(best, role)} {fastest:.3f} ms")
        tried, climbing = {best}, True
        while climbing:
            climbing = False
            for tile in neighbours(getattr(best, role)):
                trial = best._replace(**{role: tile})
                if trial in tried or not allowed(trial):
                    continue
                if time.monotonic() > end:
                    say(f"{minutes:g} minutes are over; the best so far stands")
                    return best
                tried.add(trial)
                try:
                    with tiles.trying(trial):
                        wrong = difference(job(), expected)
                        took = measure(job, hidden.device)
                except Exception as problem:  # a compiler may fail in any way; that tile is left out
                    say(f"  left out: {tile}: {type(problem).__name__}")
                    continue
                if wrong > TOLERANCE[hidden.dtype]:
                    say(f"  left out: {tile}: differs by {wrong:.1e}")
                elif took < fastest * (1 - MARGIN):
                    say(f"  {took:.3f} ms: {tile}")
                    best, fastest, climbing = trial, took, True
                    break
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, required=True, help="H, the width of the hidden states")
    parser.add_argument("--vocab", type=int, required=True, help="V, the rows of the lm_head")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=4096, help="N, for the measurement")
    parser.add_argument("--minutes", type=float, default=5.0, help="after these the best so far stands")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not INTERPRET:
        parser.error("no CUDA GPU is here")
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, args.dtype)
    source = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    hidden = torch.randn(args.tokens, args.hidden, **source).to(dtype)
    weight = (torch.randn(args.vocab, args.hidden, **source) * 2 / args.hidden**0.5).to(dtype)
    targets = torch.randint(args.vocab, (args.tokens,), **source)
    before = tiles_of(hidden, args.vocab)[1]
    best = tune(hidden, weight, targets, minutes=args.minutes)
    for role, tile in best._asdict().items():
        print(f"{role}: {tile}{'' if tile == getattr(before, role) else f', was {getattr(before, role)}'}")
    if best == before:
        print("nothing is faster than what is used already")
    elif not args.dry_run:
        tiles.remember(tiles.problem_of(args.hidden, args.vocab, hidden.element_size(), device), device, best)
        print(f"written to {tiles.cache_path()}")


if __name__ == "__main__":
    main()
