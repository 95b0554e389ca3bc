"""logprobs_from_logits against fp64 truth, both backends, with its backward pass in place or not."""

import pytest
import rto_kernels as rk
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import BACKENDS, DEVICE, DTYPES, bits, check_error
from rto_kernels import logits_logprob as module
from rto_kernels import reference
from rto_kernels._dispatch import INTERPRET, count_launches


def problem(shape, vocab, dtype=torch.float32, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, vocab, generator=g) * scale).to(dtype)
    if vocab > 3:
        logits[torch.rand(logits.shape, generator=g) < 0.1] = -torch.inf
        logits[..., 0] = 0.5  # no row of −inf alone
    targets = torch.randint(0, vocab, shape, generator=g)
    targets = torch.where(logits.gather(-1, targets[..., None])[..., 0] == -torch.inf, 0, targets)
    targets[torch.rand(shape, generator=g) < 0.2] = -100
    upstream = [torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < 0.7) for _ in range(2)]
    return logits.to(DEVICE), targets.to(DEVICE), [u.to(DEVICE) for u in upstream]


def run(function, logits, targets, upstream, entropy=True, **kw):
    logits = logits.detach().requires_grad_()
    out = function(logits * 1, targets, return_entropy=entropy, **kw)
    out = out if entropy else (out,)
    loss = sum((x * u.to(x.dtype)).sum() for x, u in zip(out, upstream, strict=False))
    return [x.detach() for x in out] + list(torch.autograd.grad(loss, logits))


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    shape=st.sampled_from([(0,), (1,), (7,), (2, 3), (0, 4), (3, 1, 2)]),
    vocab=st.sampled_from([1, 2, 5, 63, 64, 65, 150, 200]),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1.0, 0.6, 3.0]),
    entropy=st.booleans(),
    inplace=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_fp64_truth(backend, shape, vocab, dtype, temperature, entropy, inplace, seed):
    logits, targets, upstream = problem(shape, vocab, dtype, seed)
    kw = {"entropy": entropy, "temperature": temperature}
    with count_launches() as launches:
        got = run(
            rk.logprobs_from_logits,
            logits,
            targets,
            upstream,
            inplace_backward=inplace,
            backend=backend,
            **kw,
        )
    truth = run(reference.logprobs_from_logits, logits.double(), targets, upstream, **kw)
    same = run(reference.logprobs_from_logits, logits, targets, upstream, **kw)
    finite = logits.masked_fill(logits == -torch.inf, 0)
    scale = float(finite.abs().max()) / temperature if logits.numel() else 0.0
    for name, a, b, c in zip([*["logp", "entropy"][: 1 + entropy], "d(logits)"], got, truth, same, strict=True):
        assert a.dtype == (dtype if name == "d(logits)" else torch.float32)
        check_error(name, a, b, c, scale)
    expected = {"logits_logprob": 1, "logits_gradient": 1} if backend == "triton" and targets.numel() else {}
    assert launches == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_backward_writes_over_the_logits(backend):
    logits, targets, upstream = problem((6,), 70)
    expected = run(rk.logprobs_from_logits, logits, targets, upstream, backend=backend)[-1]
    x = logits.clone().requires_grad_()
    z = x * 1
    logp, entropy = rk.logprobs_from_logits(z, targets, return_entropy=True, inplace_backward=True, backend=backend)
    loss = (logp * upstream[0]).sum() + (entropy * upstream[1]).sum()
    (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert bits(grad) == bits(expected) == bits(z)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_backward_is_refused_where_it_cannot_be_seen(backend):
    logits, targets, _ = problem((6,), 70)

    def f(x):
        return rk.logprobs_from_logits(x, targets, inplace_backward=True, backend=backend)

    with pytest.raises(Exception, match=r"inplace_backward must be False under torch\.compile"):
        torch.compile(f, fullgraph=True, backend="eager")(logits)
    with pytest.raises(ValueError, match="contiguous"):
        f(logits.T.contiguous().T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_rows_that_do_not_count_goes_nowhere(backend):
    logits, targets, upstream = problem((9,), 70)
    clean = run(rk.logprobs_from_logits, logits, targets, upstream, backend=backend)
    logits[targets == -100] = torch.nan
    assert bits(*run(rk.logprobs_from_logits, logits, targets, upstream, backend=backend)) == bits(*clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time_and_alone(backend):
    logits, targets, upstream = problem((9,), 200, torch.bfloat16)
    whole = run(rk.logprobs_from_logits, logits, targets, upstream, backend=backend)
    assert bits(*whole) == bits(*run(rk.logprobs_from_logits, logits, targets, upstream, backend=backend))
    for row in (0, 4):
        at = slice(row, row + 1)
        one = run(rk.logprobs_from_logits, logits[at], targets[at], [u[at] for u in upstream], backend=backend)
        assert bits(*one) == bits(*(x[at] for x in whole))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_logits_and_expanded_gradients(backend):
    logits, targets, _ = problem((6,), 70)
    expected = rk.logprobs_from_logits(logits, targets, backend=backend)
    for strided in (logits.T.contiguous().T, torch.cat([logits, logits], 1)[:, :70]):
        x = strided.requires_grad_()
        logp = rk.logprobs_from_logits(x, targets.int(), backend=backend)
        assert bits(logp) == bits(expected)
        logp.sum().backward()
        truth = run(
            reference.logprobs_from_logits,
            logits.double(),
            targets,
            [torch.ones(6).to(DEVICE)],
            entropy=False,
        )
        torch.testing.assert_close(x.grad.double(), truth[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(INTERPRET, reason="fp64 is for the PyTorch path")
def test_gradcheck():
    logits, targets, _ = problem((5,), 12, torch.float64)
    logits = logits.nan_to_num(neginf=-3).requires_grad_()

    def f(x):
        return rk.logprobs_from_logits(x, targets, temperature=0.7, return_entropy=True, backend="torch")

    assert torch.autograd.gradcheck(f, logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    logits, targets, _ = problem((5,), 30)
    logits = logits.nan_to_num(neginf=-3).requires_grad_()
    for entropy in (False, True):
        torch.library.opcheck(module._logits_logprob, (logits, targets, 0.9, -100, entropy, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    logits, targets, upstream = problem((2, 3), 30)

    def f(x, ids, **kw):
        logp, entropy = rk.logprobs_from_logits(x * 2, ids, **kw, backend=backend)
        return logp * 3, entropy

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, logits, targets, upstream), run(f, logits, targets, upstream), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_outside_the_vocabulary(backend, monkeypatch):
    logits, targets, _ = problem((4,), 20)
    targets[:] = torch.tensor([20, -3, 0, -100])
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"targets must be in \[0, 20\)"):
            rk.logprobs_from_logits(logits, targets, backend=backend)
    monkeypatch.setattr(module, "values_checked", lambda tensor: False)
    logp = rk.logprobs_from_logits(logits, targets, backend=backend)
    assert logp.isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 0)}, r"logits must have shape \[\.\.\., V\]"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int32)}, "logits must have dtype"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets must have shape \[3\]"),
        ({"targets": torch.zeros(3)}, "targets must have dtype"),
        ({"temperature": -1.0}, "temperature must be a positive number"),
    ],
)
def test_bad_input_is_named(backend, change, message):
    given = {
        "logits": torch.zeros(3, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
        "backend": backend,
        **change,
    }
    on_device = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        rk.logprobs_from_logits(**on_device)
