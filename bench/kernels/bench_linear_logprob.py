"""Log-probs straight from hidden states, forward and backward, beside ways that hold logits, and peers'.

The three matrix products (logits, d(hidden), d(weight)) are 6·N·H·V operations; recomputing the logits
makes it 8. Memory is counted above the inputs and the weight's gradient, which every way has to hold.
`forward` is the pass without gradient beside the bare product, `cross_entropy` the job of kernels that give only
a mean loss, `tokens` runs 1k to 16k tokens for the plot of cost against tokens.
"""

from functools import partial

import pytest
import rto_kernels as rk
import torch

from bench.harness import DEVICE, FULL, ON_GPU, ROUNDS, compare, gradients, source
from bench.kernels.peers import (
    chunked_products,
    compiled,
    cut_cross_entropy_logp,
    eager_logp,
    liger_logp,
    log_softmax_logp,
    openrlhf_logp,
    quack_cross_entropy,
    trl_chunked,
    verl_logp,
)

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 2e-2 if ON_GPU else 1e-4
if ON_GPU:
    SHAPES = [(4096, 4096, 128256), (8192, 4096, 128256)]
elif FULL:
    SHAPES = [(1024, 512, 64000), (4096, 1024, 128256)]
else:
    SHAPES = [(256, 128, 8192)]
BIG_ROUNDS = min(ROUNDS, 15 if ON_GPU else 3)


def problem(tokens: int, hidden: int, vocab: int):
    random = source()
    h = torch.randn(tokens, hidden, **random).to(DTYPE).requires_grad_()
    w = (torch.randn(vocab, hidden, **random) * 2 / hidden**0.5).to(DTYPE).requires_grad_()
    targets = torch.randint(vocab, (tokens,), **random)
    up = torch.randn(tokens, **random)

    def run(function):
        logp = function(h, w, targets)
        return gradients({"logp": logp}, {"logp": up.to(logp.dtype)}, {"hidden": h, "weight": w})

    return run, (h, w, targets)


def through_logits(logp):
    return lambda h, w, t: logp(h @ w.T, t)


def truth(h, w, t):
    """Log-probs of exact logits: bf16 operands are widened first, so nothing is rounded before the gradients."""
    return log_softmax_logp(h.float() @ w.float().T, t)


@pytest.mark.parametrize(("tokens", "hidden", "vocab"), SHAPES)
def test_token_logprobs(once, tokens, hidden, vocab):
    run, (h, w, _) = problem(tokens, hidden, vocab)
    functions = {
        "ours": rk.token_logprobs,
        "ours, bf16 kept": partial(rk.token_logprobs, save_probs=torch.bfloat16),
        "ours, 0.7 of bf16 kept": partial(rk.token_logprobs, save_probs=torch.bfloat16, save_share=0.7),
        "products, fused epilogue": chunked_products(tokens),
        "chunked products": chunked_products(max(1, tokens // 4)),
        "log_softmax": through_logits(log_softmax_logp),
        "eager": through_logits(eager_logp),
        "OpenRLHF's formula": through_logits(openrlhf_logp),
        "TRL fused head": trl_chunked(),
        "Liger": liger_logp(),
        "verl": verl_logp(),
        "cut-cross-entropy": cut_cross_entropy_logp(),
        "torch.compile": compiled(through_logits(eager_logp)),
    }
    contenders = {n: lambda f=f: run(f) for n, f in functions.items() if f is not None}
    # The products alone, without softmax or loss: what a free epilogue would cost.
    upstream = torch.full((1, 1), 1e-3, device=DEVICE, dtype=DTYPE).expand(tokens, vocab)
    contenders["three products"] = lambda: products(h, w, upstream)
    tolerance = {name: 2e-2 if "bf16" in name else TOLERANCE for name in contenders}
    record = compare(
        "token_logprobs", f"N {tokens}, H {hidden}, V {vocab}", contenders, tolerance=tolerance,
        reference=lambda: run(truth), flops=6 * tokens * hidden * vocab,
        held=(w.numel() + h.numel()) * w.element_size(), rounds=BIG_ROUNDS if vocab > 100_000 else ROUNDS,
        shape={"N": tokens, "H": hidden, "V": vocab, "dtype": str(DTYPE)}, floors=("three products",),
    )  # fmt: skip
    once(contenders["ours"], record)


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "hidden", "vocab"), SHAPES)
def test_forward(once, tokens, hidden, vocab):
    _, (h, w, targets) = problem(tokens, hidden, vocab)
    functions = {
        "ours": rk.token_logprobs,
        "products, fused epilogue": chunked_products(tokens),
        "chunked products": chunked_products(max(1, tokens // 4)),
        "eager": through_logits(eager_logp),
        "TRL fused head": trl_chunked(),
        "Liger": liger_logp(),
        "verl": verl_logp(),
        "cut-cross-entropy": cut_cross_entropy_logp(),
        "torch.compile": compiled(through_logits(eager_logp)),
    }
    contenders = {n: lambda f=f: {"logp": f(h, w, targets)} for n, f in functions.items() if f is not None}
    contenders["one product"] = lambda: {"logits": h @ w.T}
    record = compare(
        "token_logprobs_forward", f"N {tokens}, H {hidden}, V {vocab}", contenders, tolerance=TOLERANCE,
        reference=lambda: {"logp": truth(h, w, targets)}, flops=2 * tokens * hidden * vocab,
        shape={"N": tokens, "H": hidden, "V": vocab, "dtype": str(DTYPE)}, floors=("one product",),
        rounds=BIG_ROUNDS if vocab > 100_000 else ROUNDS,
    )  # fmt: skip
    once(contenders["ours"], record)


@pytest.mark.parametrize(("tokens", "hidden", "vocab"), SHAPES)
def test_cross_entropy(once, tokens, hidden, vocab):
    """Gradients of the mean −log-prob. The policy loss has the same where nothing has moved and advantages are 1."""
    _, (h, w, targets) = problem(tokens, hidden, vocab)
    with torch.no_grad():
        old_logp = rk.token_logprobs(h, w, targets)
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)

    def mean_loss(logp):
        return lambda h, w, t: -logp(h, w, t).mean()

    def policy_loss(h, w, t):
        one = torch.ones_like(old_logp)
        return rk.fused_linear_ppo_loss(h, w, t, old_logp, one, clip=None, cu_seqlens=ends).policy_loss

    def run(loss):
        up = torch.tensor(tokens, dtype=torch.float32, device=DEVICE)  # keeps bf16 gradients in range
        loss = loss(h, w, targets)
        d_hidden, d_weight = torch.autograd.grad(loss, (h, w), up.to(loss.dtype))
        return {"d_hidden": d_hidden, "d_weight": d_weight}

    functions = {
        "ours": policy_loss,
        "ours, any gradient": mean_loss(rk.token_logprobs),
        "products, fused epilogue": mean_loss(chunked_products(tokens)),
        "chunked products": mean_loss(chunked_products(max(1, tokens // 4))),
        "eager": mean_loss(through_logits(eager_logp)),
        "quack": quack_cross_entropy(),
        "torch.compile": compiled(mean_loss(through_logits(eager_logp))),
    }
    others = {"Liger": liger_logp(), "verl": verl_logp(), "cut-cross-entropy": cut_cross_entropy_logp()}
    functions |= {name: mean_loss(logp) for name, logp in others.items() if logp is not None}
    contenders = {n: lambda f=f: run(f) for n, f in functions.items() if f is not None}
    record = compare(
        "cross_entropy", f"N {tokens}, H {hidden}, V {vocab}", contenders, tolerance=TOLERANCE,
        reference=lambda: run(mean_loss(truth)), flops=6 * tokens * hidden * vocab,
        held=(w.numel() + h.numel()) * w.element_size(), rounds=BIG_ROUNDS if vocab > 100_000 else ROUNDS,
        shape={"N": tokens, "H": hidden, "V": vocab, "dtype": str(DTYPE)},
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
        reference=lambda: run(truth), flops=6 * tokens * hidden * vocab,
        held=(w.numel() + h.numel()) * w.element_size(),
        shape={"N": tokens, "H": hidden, "V": vocab, "dtype": str(DTYPE)},
    )  # fmt: skip
    once(contenders["ours"], record)
