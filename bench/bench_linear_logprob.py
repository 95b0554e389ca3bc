"""Log-probs straight from hidden states, forward and backward, beside ways that hold logits, and peers'.

The three matrix products (logits, d(hidden), d(weight)) are 6·N·H·V operations; recomputing the logits
makes it 8. Memory is counted above the inputs and the weight's gradient, which every way has to hold.
`tokens` runs 1k to 16k tokens for the plot of cost against tokens.
"""

import pytest
import rto_kernels as rk
import torch
from harness import DEVICE, FULL, ON_GPU, ROUNDS, compare, gradients
from peers import (
    compiled,
    cut_cross_entropy_logp,
    eager_logp,
    liger_logp,
    log_softmax_logp,
    openrlhf_logp,
    quack_logp,
    trl_chunked,
)

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 2e-2 if ON_GPU else 1e-4
if ON_GPU:
    SHAPES = [(4096, 4096, 128256), (8192, 4096, 128256)]
elif FULL:
    SHAPES = [(1024, 512, 64000), (4096, 1024, 128256)]
else:
    SHAPES = [(256, 128, 8192)]


def problem(tokens: int, hidden: int, vocab: int):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, hidden, generator=generator).to(DEVICE, DTYPE).requires_grad_()
    w = (torch.randn(vocab, hidden, generator=generator) * 2 / hidden**0.5).to(DEVICE, DTYPE).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator).to(DEVICE)
    up = torch.randn(tokens, generator=generator).to(DEVICE)

    def run(function):
        logp = function(h, w, targets)
        return gradients({"logp": logp}, {"logp": up.to(logp.dtype)}, {"hidden": h, "weight": w})

    return run, (h, w, targets)


def through_logits(logp):
    return lambda h, w, t: logp(h @ w.T, t)


@pytest.mark.parametrize(("tokens", "hidden", "vocab"), SHAPES)
def test_token_logprobs(once, tokens, hidden, vocab):
    run, (h, w, _) = problem(tokens, hidden, vocab)
    functions = {
        "ours": rk.token_logprobs,
        "ours, bf16 kept": lambda h, w, t: rk.token_logprobs(h, w, t, save_probs=torch.bfloat16),
        "log_softmax": through_logits(log_softmax_logp),
        "eager": through_logits(eager_logp),
        "OpenRLHF's formula": through_logits(openrlhf_logp),
        "TRL fused head": trl_chunked(),
        "Liger": liger_logp(),
        "quack": quack_logp(),
        "cut-cross-entropy": cut_cross_entropy_logp(),
        "torch.compile": compiled(through_logits(eager_logp)),
    }
    contenders = {n: lambda f=f: run(f) for n, f in functions.items() if f is not None}
    # The products alone, without softmax or loss: what a free epilogue would cost.
    upstream = torch.full((1, 1), 1e-3, device=DEVICE, dtype=DTYPE).expand(tokens, vocab)
    contenders["three products"] = lambda: products(h, w, upstream)
    tolerance = dict.fromkeys(contenders, TOLERANCE) | {"ours, bf16 kept": 2e-2}
    record = compare(
        "token_logprobs", f"N {tokens}, H {hidden}, V {vocab}", contenders, tolerance=tolerance,
        reference=contenders["log_softmax"], flops=6 * tokens * hidden * vocab,
        held=(w.numel() + h.numel()) * w.element_size(), rounds=min(ROUNDS, 3) if vocab > 100_000 else ROUNDS,
        shape={"N": tokens, "H": hidden, "V": vocab, "dtype": str(DTYPE)}, floors=("three products",),
    )  # fmt: skip
    once(contenders["ours"], record)


def products(h, w, upstream):
    with torch.no_grad():
        logits = h @ w.T
        gradient = upstream.contiguous()
        return {"logp": logits[:, 0], "d_hidden": gradient @ w, "d_weight": gradient.T @ h}


TOKENS = [1024, 2048, 4096, 8192, 16384]


@pytest.mark.parametrize("tokens", TOKENS if FULL else [n // 8 for n in TOKENS])
def test_cost_against_tokens(once, tokens):
    hidden, vocab = (4096, 128256) if ON_GPU else (64, 8192)
    run, (h, w, _) = problem(tokens, hidden, vocab)
    functions = {"ours": rk.token_logprobs, "eager": through_logits(eager_logp)}
    contenders = {name: lambda function=function: run(function) for name, function in functions.items()}
    record = compare(
        "cost_against_tokens", str(tokens), contenders, tolerance=TOLERANCE,
        reference=contenders["eager"], flops=6 * tokens * hidden * vocab,
        held=(w.numel() + h.numel()) * w.element_size(),
        shape={"N": tokens, "H": hidden, "V": vocab, "dtype": str(DTYPE)},
    )  # fmt: skip
    once(contenders["ours"], record)
