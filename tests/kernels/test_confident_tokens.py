"""Gradients of tokens that the model is sure of, as most tokens of a language model are.

dL/dz of a target is g·(1 − p): with p near 1 it is made of what rounding of p, or of the log-sum-exp, throws away.
Targets here have p from 0.1 to 1 − 1e-6, and the error is judged row by row: the Frobenius norm alone is that of the
few uncertain rows. The bound is what eager PyTorch loses in the same dtype.
"""

import pytest
import rto_kernels as rk
import torch
from kernel_checks import BACKENDS, DEVICE
from rto_kernels import reference

N, H, V = 96, 40, 330
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of fp32 a share of a percent: 1e-6 beside 1 leaves one digit of it, which is rounding's in every formula.
SLACK = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 5e-3}


def sure_problem(dtype: torch.dtype, seed: int = 0):
    """(hidden, weight, targets, upstream): row i's target has p rising with i from 0.1 to 1 − 1e-6."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, H, generator=generator).double().to(dtype).double()
    targets = torch.randint(V, (N,), generator=generator)
    noise = 0.1 * torch.randn(N, H, generator=generator).double()
    p = 1 - torch.logspace(-6, torch.log10(torch.tensor(0.9)).item(), N).flip(0).double()
    toward = weight[targets] / weight[targets].norm(dim=1, keepdim=True)
    low, high = torch.zeros(N, 1).double(), torch.full((N, 1), 64.0).double()
    for _ in range(60):  # bisection for the length that gives p
        middle = (low + high) / 2
        got = torch.softmax((noise + middle * toward) @ weight.T, 1).gather(1, targets[:, None])
        less = got < p[:, None]
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    upstream = (torch.rand(N, generator=generator) + 0.5) * torch.randn(N, generator=generator).sign()
    hidden = (noise + high * toward).to(dtype)
    return hidden.to(DEVICE), weight.to(dtype).to(DEVICE), targets.to(DEVICE), upstream.to(DEVICE)


def gradients(function, hidden, weight, upstream):
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    logp = function(*leaves)
    return torch.autograd.grad((logp * upstream.to(logp.dtype)).sum(), leaves)


def row_errors(got: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Relative errors: of the whole, of the median row, of the row that nine in ten are better than."""
    assert got.isfinite().all()
    difference, size = (got.double() - truth).norm(dim=1), truth.norm(dim=1)
    rows = difference / size.clamp(min=1e-300)
    return {
        "whole": float(difference.norm() / size.norm()),
        "median row": float(rows.median()),
        "90 % row": float(rows.quantile(0.9)),
    }


def check_rows(name: str, got, truth, eager) -> None:
    ours, theirs = row_errors(got, truth), row_errors(eager, truth)
    for what, error in ours.items():
        bound = 1.1 * theirs[what] + SLACK[got.dtype]
        assert error <= bound, f"{name}, {what}: error {error:.2g} above {bound:.2g} (eager: {theirs[what]:.2g})"


def eager(targets):
    return lambda h, w: torch.log_softmax((h @ w.T).float(), 1).gather(1, targets[:, None])[:, 0]


def exact(targets):
    return lambda h, w: torch.log_softmax(h @ w.T, 1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "save"),
    [(d, save) for d in DTYPES for save in (False, True) if not (save and d == torch.float32)],
)  # fp32 gradients of probabilities kept in bf16 are bf16's
@pytest.mark.parametrize("seed", [0, 1])
def test_token_logprobs(backend, dtype, save, seed):
    hidden, weight, targets, upstream = sure_problem(dtype, seed)
    truth = gradients(exact(targets), hidden.double(), weight.double(), upstream)
    plain = gradients(eager(targets), hidden, weight, upstream)
    got = gradients(
        lambda h, w: rk.token_logprobs(h, w, targets, save_probs=save, backend=backend), hidden, weight, upstream
    )
    for name, *three in zip(("d(hidden)", "d(weight)"), got, truth, plain, strict=True):
        check_rows(name, *three)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("drift", [0.0, 0.3, 8.0])
def test_fused_linear_ppo_loss(backend, dtype, drift):
    """`drift`: how far the policy has moved from the one that sampled, nats."""
    hidden, weight, targets, upstream = sure_problem(dtype)
    moved = drift * torch.randn(N, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    ends = torch.tensor([0, N], dtype=torch.int32, device=DEVICE)

    def loss(logp):
        ratio = (logp - old_logp.to(logp.dtype)).exp()
        return -(ratio * upstream.to(logp.dtype)).sum()

    old_logp = exact(targets)(hidden.double(), weight.double()).float() + moved

    def grads(logp, h, w):
        leaves = [x.detach().requires_grad_() for x in (h, w)]
        return torch.autograd.grad(loss(logp(*leaves)), leaves)

    truth = grads(exact(targets), hidden.double(), weight.double())
    plain = grads(eager(targets), hidden, weight)
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    out = rk.fused_linear_ppo_loss(
        *leaves, targets, old_logp, upstream, clip=None, cu_seqlens=ends, aggregation="token",
        denominator=1.0, backend=backend,
    )  # fmt: skip
    got = torch.autograd.grad(out.policy_loss, leaves)
    for name, *three in zip(("d(hidden)", "d(weight)"), got, truth, plain, strict=True):
        check_rows(name, *three)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", [60.0, 90.0, 95.0, 100.0])
def test_a_token_that_became_unthinkable_spoils_no_other(backend, distance):
    """Its ratio is e^−distance, at the end of what fp32 and bf16 hold; its gradient is next to nothing."""
    hidden, weight, targets, upstream = sure_problem(torch.bfloat16)
    old_logp = exact(targets)(hidden.double(), weight.double()).float()
    old_logp[::3] += distance
    ends = torch.tensor([0, N], dtype=torch.int32, device=DEVICE)

    def grads(rows):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        out = rk.fused_linear_ppo_loss(
            *leaves, targets, old_logp, upstream * rows, clip=None, cu_seqlens=ends, aggregation="token",
            denominator=1.0, backend=backend,
        )  # fmt: skip
        return torch.autograd.grad(out.policy_loss, leaves)

    others = torch.ones(N, device=DEVICE)
    others[::3] = 0
    for got, without in zip(grads(torch.ones(N, device=DEVICE)), grads(others), strict=True):
        torch.testing.assert_close(got, without, rtol=1e-2, atol=1e-20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_logprobs_from_logits(backend, dtype, inplace):
    hidden, weight, targets, upstream = sure_problem(dtype)
    logits = (hidden.float() @ weight.float().T).to(dtype)

    def grad(function, z):
        z = z.clone().requires_grad_()
        logp = function(z)
        return torch.autograd.grad((logp * upstream.to(logp.dtype)).sum(), z)[0]

    truth = grad(lambda z: reference.logprobs_from_logits(z, targets), logits.double())
    plain = grad(lambda z: torch.log_softmax(z.float(), 1).gather(1, targets[:, None])[:, 0], logits)
    got = grad(lambda z: rk.logprobs_from_logits(z, targets, inplace_backward=inplace, backend=backend), logits)
    check_rows("d(logits)", got, truth, plain)
