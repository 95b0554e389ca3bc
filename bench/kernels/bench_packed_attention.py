"""Attention over packed sequences, beside each sequence alone, forward and backward, at Llama-3.2-1B's heads.

Ours is PyTorch's varlen kernel on a GPU, one sdpa call for each run of equal lengths on a CPU. Judged against each
sequence alone in fp32. The lengths are all different, as in a rollout: a run then is one sequence.
"""

import pytest
import torch
import torch.nn.functional as F

from bench.harness import DEVICE, FULL, ON_GPU, compare, source

attention = pytest.importorskip("rto_fast.models.attention")

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 2e-2 if ON_GPU else 1e-4
HEADS, KEY_HEADS, WIDTH = (32, 8, 64) if ON_GPU else (4, 2, 16)
LENGTHS = [531 + 97 * i for i in range(16)] if FULL else [5, 9, 17, 40]


def alone(q, k, v):
    """[1, N, heads, d]: each sequence by its own call."""
    parts = zip(*(x[0].split(LENGTHS, dim=1) for x in (q, k, v)), strict=True)
    outs = [F.scaled_dot_product_attention(*(x[None] for x in part), is_causal=True, enable_gqa=True) for part in parts]
    return torch.cat([out[0].transpose(0, 1) for out in outs])[None]


def packed(kernel: str):
    layout = attention.PackedLayout.make(LENGTHS, DEVICE, kernel)
    return lambda q, k, v: attention.packed_attention(None, q, k, v, None, packed_layout=layout)[0]


def test_packed_attention(once):
    random, tokens = source(), sum(LENGTHS)
    query, key, value = (
        torch.randn(1, heads, tokens, WIDTH, **random).to(DTYPE).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    up = torch.randn(1, tokens, HEADS, WIDTH, **random)

    def run(function, dtype=DTYPE):
        leaves = {n: x.detach().to(dtype).requires_grad_() for n, x in (("q", query), ("k", key), ("v", value))}
        out = function(*leaves.values())
        grads = torch.autograd.grad(out, list(leaves.values()), up.to(out.dtype))
        return {"out": out.detach()} | {f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}

    functions = {"ours": packed("varlen" if ON_GPU else "sdpa"), "sdpa run by run": packed("sdpa"), "alone": alone}
    contenders = {name: lambda f=f: run(f) for name, f in functions.items()}
    record = compare(
        "packed_attention", f"{len(LENGTHS)} sequences, {tokens} tokens", contenders,
        reference=lambda: run(alone, torch.float32), tolerance=TOLERANCE,
        # Two products forward and five backward, over half of the square.
        flops=7 * HEADS * WIDTH * sum(n * n for n in LENGTHS),
        shape={"N": tokens, "heads": HEADS, "width": WIDTH, "dtype": str(DTYPE)},
    )  # fmt: skip
    once(contenders["ours"], record)
