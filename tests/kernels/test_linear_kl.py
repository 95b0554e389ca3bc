"""KL of two next-token distributions: values and gradients against fp64 from whole logits."""

from __future__ import annotations

import pytest
import torch
from rto_kernels import linear_kl, token_kl
from rto_kernels._vocab_torch import BLOCK_TOKENS, BLOCK_VOCAB


def inputs(n, vocab, width, ref_width, dtype, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "hidden": (n, width), "weight": (vocab, width), "ref_hidden": (n, ref_width), "ref_weight": (vocab, ref_width),
        "bias": (vocab,), "ref_bias": (vocab,),
    }  # fmt: skip
    return {k: (scale * torch.randn(s, generator=g, dtype=torch.float64)).to(dtype) for k, s in shapes.items()}


def truth(x, softcap, ref_softcap):
    """KL from whole fp64 log-softmaxes."""
    z = x["hidden"] @ x["weight"].T + x["bias"]
    q = x["ref_hidden"] @ x["ref_weight"].T + x["ref_bias"]
    z, q = (s * torch.tanh(a / s) if s else a for a, s in ((z, softcap), (q, ref_softcap)))
    z, q = z.log_softmax(-1), q.log_softmax(-1)
    return (q.exp() * (q - z)).sum(-1)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize(("n", "vocab"), [(0, 7), (1, 1), (5, 131), (BLOCK_TOKENS + 3, 61), (9, BLOCK_VOCAB + 5)])
def test_values_and_gradients(n, vocab, softcap):
    x = {k: v.requires_grad_(not k.startswith("ref")) for k, v in inputs(n, vocab, 17, 11, torch.float32).items()}
    x64 = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in x.items()}
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(1))
    upstream[::3] = 0
    kl = token_kl(**x, softcap=softcap, ref_softcap=2 * softcap)
    assert kl.dtype == torch.float32
    (kl * upstream).sum().backward()
    expected = truth(x64, softcap, 2 * softcap)
    (expected * upstream.double()).sum().backward()
    torch.testing.assert_close(kl.double(), expected, rtol=2e-5, atol=2e-5)
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(x[name].grad.double(), x64[name].grad, rtol=1e-4, atol=2e-5)


def test_fp64_agrees_to_fp64_and_gradcheck():
    x = inputs(4, 9, 3, 2, torch.float64)
    torch.testing.assert_close(token_kl(**x), truth(x, 0, 0), rtol=1e-12, atol=1e-12)
    for name in ("hidden", "weight", "bias"):
        x[name].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_kl(h, w, x["ref_hidden"], x["ref_weight"], bias=b, ref_bias=x["ref_bias"], softcap=3.0),
        (x["hidden"], x["weight"], x["bias"]),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_nothing_in_between(dtype):
    """The inputs are rounded, the arithmetic is fp32; gradients come back in the inputs' dtype."""
    x = inputs(33, 300, 24, 24, dtype, scale=0.5)
    expected = truth({k: v.double() for k, v in x.items()}, 0, 0)
    x["hidden"].requires_grad_()
    kl = token_kl(**x)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.detach().double(), expected, rtol=1e-5, atol=1e-5)
    kl.sum().backward()
    assert x["hidden"].grad.dtype == dtype


def test_equal_distributions_have_no_divergence_and_no_gradient():
    x = inputs(6, 50, 8, 8, torch.float32, scale=3.0)
    hidden = x["hidden"].clone().requires_grad_()
    kl = token_kl(hidden, x["weight"], x["hidden"], x["weight"])
    kl.sum().backward()
    assert kl.abs().max() < 2e-5
    assert hidden.grad.abs().max() < 2e-5


def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch):
    """No tensor of the forward or backward pass is as large as [N, V]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    n, vocab, largest = 300, 500, 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    x = inputs(n, vocab, 8, 8, torch.float32)
    x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    with Sizes():
        token_kl(**x).sum().backward()
    assert largest == x["weight"].numel()  # nothing is larger than d(weight)


def test_batch_determinism():
    x = inputs(40, 7, 13, 11, torch.float32)
    whole = token_kl(**x, deterministic="batch")
    for rows in (slice(0, 1), slice(7, 8), slice(3, 20), slice(16, 40)):
        part = token_kl(**(x | {k: x[k][rows] for k in ("hidden", "ref_hidden")}), deterministic="batch")
        assert torch.equal(part.view(torch.int32), whole[rows].view(torch.int32))


def test_bad_input_is_named():
    x = inputs(4, 9, 3, 2, torch.float32)
    with pytest.raises(ValueError, match="ref_hidden must have shape"):
        token_kl(**(x | {"ref_hidden": x["ref_hidden"][:2]}))
    with pytest.raises(ValueError, match="ref_weight must have shape"):
        token_kl(**(x | {"ref_weight": x["ref_weight"][:5]}))
    with pytest.raises(ValueError, match="ref_weight must have dtype"):
        token_kl(**(x | {"ref_weight": x["ref_weight"].bfloat16()}))
    with pytest.raises(ValueError, match="softcap must be"):
        token_kl(**x, softcap=-1.0)
    with pytest.raises(ValueError, match="deterministic must be None or 'batch'"):
        token_kl(**x, deterministic="yes")


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_operands_of_16_bits_as_on_a_gpu(monkeypatch, softcap):
    """There bf16 is multiplied as bf16 with fp32 sums: no further from the truth than eager bf16 is."""
    monkeypatch.setattr(linear_kl, "operand_dtype", lambda x: x.dtype)
    x = inputs(33, 300, 24, 24, torch.bfloat16, scale=0.5)
    upstream = torch.randn(33, generator=torch.Generator().manual_seed(1))

    def run(function, dtype):
        leaves = {k: v.to(dtype).requires_grad_(not k.startswith("ref")) for k, v in x.items()}
        kl = function(leaves)
        grads = torch.autograd.grad(
            (kl * upstream.to(kl.dtype)).sum(), [leaves[k] for k in ("hidden", "weight", "bias")]
        )
        return [kl, *grads]

    got = run(lambda x: token_kl(**x, softcap=softcap, ref_softcap=softcap), torch.bfloat16)
    expected = run(lambda x: truth(x, softcap, softcap), torch.float64)
    eager = run(lambda x: truth(x, softcap, softcap).float(), torch.bfloat16)
    for ours, exact, theirs in zip(got, expected, eager, strict=True):
        error, bound = ((y.double() - exact).norm() / exact.norm() for y in (ours, theirs))
        assert error <= 1.1 * bound + 4e-3
    assert (got[0].double() - expected[0]).abs().max() < 1e-4
