"""Every public kernel, run again on the same inputs: do the bits of its results and gradients stay the same?

    python -m bench.kernels.determinism --runs 20            writes run/determinism of bench/results/<device>.json
    compute-sanitizer python -m bench.kernels.determinism --runs 1 --small

Memory is dirtied between runs, so that a result which depends on what an output held before shows too.
"""

import argparse
from collections.abc import Callable, Iterator

import rto_kernels as rk
import torch
from torch import Tensor

from bench.harness import DEVICE, RUN, resumed, save, source

BETAS = {"beta1": 0.05, "beta2": 0.01, "dpo_clip": 0.05}
Case = tuple[str, Callable[[], list[Tensor]]]


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    total = sum((x * torch.linspace(0.5, 1.5, x.numel(), device=x.device).view(x.shape)).sum() for x in outputs)
    return [x.detach() for x in outputs] + list(torch.autograd.grad(total, leaves))


def head_cases(tokens: int, width: int, vocab: int, dtype: torch.dtype) -> Iterator[Case]:
    """Every variant in bf16; of the other types the plain and the fullest, since each variant is compiled anew."""
    random = source()
    hidden = torch.randn(tokens, width, **random).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, **random) * 2 / width**0.5).to(dtype).requires_grad_()
    bias = torch.randn(vocab, **random).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), **random)
    old_logp, advantages = torch.randn(tokens, **random) * 0.1 - 10, torch.randn(tokens, **random)
    ends = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32, device=DEVICE)
    scores = torch.randn(2, **random)
    name = f"H {width} {str(dtype).removeprefix('torch.')}"

    def logprobs(full: bool, save_probs: bool) -> list[Tensor]:
        extra = {"bias": bias, "softcap": 30.0, "return_entropy": True} if full else {}
        kept = torch.bfloat16 if save_probs else False
        out = rk.token_logprobs(hidden, weight, targets, save_probs=kept, **extra)
        return gradients(list(out) if full else [out], [hidden, weight, bias] if full else [hidden, weight])

    def ppo() -> list[Tensor]:
        out = rk.fused_linear_ppo_loss(hidden, weight, targets, old_logp, advantages, cu_seqlens=ends)
        return [out.logp, *gradients([out.policy_loss], [hidden, weight])]

    def rewards() -> list[Tensor]:
        with torch.no_grad():
            return list(rk.fused_token_rewards([hidden] * 3, [weight] * 3, targets, scores, cu_seqlens=ends, **BETAS))

    for full in (False, True):
        for save_probs in (False, True) if dtype == torch.bfloat16 else (False,):
            words = f"{', bias, soft-cap, entropy' if full else ''}{', kept' if save_probs else ''}"
            yield f"token_logprobs {name}{words}", lambda full=full, keep=save_probs: logprobs(full, keep)
    if dtype != torch.float16:  # whose gradients it refuses
        yield f"fused_linear_ppo_loss {name}", ppo
    yield f"fused_token_rewards {name}", rewards


def logits_cases(tokens: int, vocab: int, dtype: torch.dtype) -> Iterator[Case]:
    random = source()
    logits = torch.randn(1, tokens, vocab, **random).mul_(3).to(dtype).requires_grad_()
    targets, scores = torch.randint(vocab, (1, tokens), **random), torch.randn(1, **random)
    name = f"V {vocab} {str(dtype).removeprefix('torch.')}"

    def gather() -> list[Tensor]:
        return gradients(list(rk.logprobs_from_logits(logits, targets, return_entropy=True)), [logits])

    def rewards() -> list[Tensor]:
        return list(rk.logits_token_rewards(logits, logits, logits, targets, scores, **BETAS))

    yield f"logprobs_from_logits {name}", gather
    yield f"logits_token_rewards {name}", rewards


def token_cases(batch: int, width: int) -> Iterator[Case]:
    random = source()
    lens = torch.randint(1, width + 1, (batch, 1), **random)
    mask = torch.arange(width, device=DEVICE) < lens
    a, b, c, values = (torch.randn(batch, width, **random) * 0.3 for _ in range(4))
    scores = torch.randn(batch, **random)
    leaf, value_leaf = (x.clone().requires_grad_() for x in (a, values))

    def loss() -> list[Tensor]:
        out = rk.ppo_loss(leaf, b, c, value_leaf, values, a, mask=mask)
        return [*gradients([out.policy_loss, out.value_loss], [leaf, value_leaf]), *out.stats]

    def both() -> list[Tensor]:
        out, estimate = rk.gae_ppo_loss(leaf, b, c, values, value_leaf, mask=mask)
        return [*gradients([out.policy_loss, out.value_loss], [leaf, value_leaf]), *estimate]

    def rewards_gae() -> list[Tensor]:
        return [x for group in rk.rewards_gae(a, b, c, scores, values, mask=mask, **BETAS) for x in group]

    yield "token_rewards", lambda: list(rk.token_rewards(a, b, c, scores, mask=mask, **BETAS))
    yield "gae", lambda: list(rk.gae(a, values, mask=mask))
    yield "rewards_gae", rewards_gae
    yield "ppo_loss", loss
    yield "gae_ppo_loss", both


def cases(small: bool) -> Iterator[Case]:
    tokens, vocab = (70, 1003) if small else (1031, 32003)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        # Rows of whole 16 bytes take tensor descriptors, others plain pointers.
        widths = (64, 77) if small else (512, 509)
        for width in widths if dtype == torch.bfloat16 else widths[:1]:
            yield from head_cases(tokens, width, vocab, dtype)
        yield from logits_cases(tokens, vocab, dtype)
    yield from token_cases(*((5, 70) if small else (128, 1024)))


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors if t.numel()]


def moved(case: Callable[[], list[Tensor]], runs: int) -> int:
    """How many of the later runs differ from the first."""
    first, different = bits(case()), 0
    for _ in range(runs - 1):
        torch.randn(1 << (24 if DEVICE == "cuda" else 12), device=DEVICE)  # dirt for the next outputs
        different += bits(case()) != first
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="sizes for a memory checker")
    args = parser.parse_args()
    before = resumed("determinism") if args.runs > 1 else {}
    found = dict(before["differing"]) if before.get("runs") == args.runs else {}
    for name, case in cases(args.small):
        if name in found:
            continue
        found[name] = different = moved(case, args.runs)
        verdict = f"{different} of {args.runs - 1} runs differ" if different else "same bits"
        print(f"{name:70} {verdict}", flush=True)
        if args.runs > 1:
            save(RUN, "determinism", {"runs": args.runs, "differing": found})
    assert not any(found.values()), "results moved between runs of the same inputs"


if __name__ == "__main__":
    main()
