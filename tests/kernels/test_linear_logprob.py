"""token_logprobs against fp64 truth: values and every gradient, both backends."""

import pytest
import rto_kernels as rk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import BACKENDS, DEVICE, DTYPES, bits, check_error
from rto_kernels import _dispatch, _vocab_torch, linear_backward, linear_forward, reference
from rto_kernels import linear_logprob as module
from rto_kernels._dispatch import INTERPRET, count_launches

TRITON_ONLY = BACKENDS[1:]


def random(generator, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


class Problem:
    """Random inputs, and upstream gradients of which some rows are 0."""

    def __init__(self, n, width, vocab, dtype=torch.float32, bias=False, seed=0, ignored=0.2):
        g = torch.Generator().manual_seed(seed)
        self.hidden = random(g, n, width, dtype=dtype)
        self.weight = random(g, vocab, width, dtype=dtype, scale=1.5 * width**-0.5)
        self.bias = random(g, vocab, dtype=dtype) if bias else None
        self.targets = torch.randint(0, vocab, (n,), generator=g).to(DEVICE)
        self.ignored = (torch.rand(n, generator=g) < ignored).to(DEVICE)
        self.targets[self.ignored] = -100
        keep = (torch.rand(2, n, generator=g) < 0.7).to(DEVICE)
        self.upstream = [random(g, n) * k for k in keep]

    @property
    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def run(self, function, convert=lambda x: x, entropy=True, **kw):
        """(outputs…, gradients…) of `function` on converted copies of the inputs."""
        leaves = [convert(x).detach().requires_grad_() for x in self.leaves]
        bias = leaves[2] if self.bias is not None else None
        out = function(leaves[0], leaves[1], self.targets, bias=bias, return_entropy=entropy, **kw)
        out = out if entropy else (out,)
        loss = sum((x * u.to(x.dtype)).sum() for x, u in zip(out, self.upstream, strict=False))
        return [x.detach() for x in out] + list(torch.autograd.grad(loss, leaves))


def same_dtype(hidden, weight, targets, *, bias=None, temperature=1.0, softcap=None, return_entropy=False):
    """The way it is usually written: logits in the inputs' dtype, log_softmax of them in fp32."""
    z = hidden @ weight.T
    z = z if bias is None else z + bias
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return reference.logprobs_from_logits(z, targets, temperature=temperature, return_entropy=return_entropy)


def names(problem, entropy):
    grads = ["d(hidden)", "d(weight)", "d(bias)"][: len(problem.leaves)]
    return ["logp", "entropy", *grads] if entropy else ["logp", *grads]


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    n=st.sampled_from([0, 1, 2, 15, 17, 33]),
    width=st.sampled_from([1, 3, 8, 13, 16, 40]),
    vocab=st.sampled_from([1, 2, 31, 33, 64, 97, 129, 200]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    entropy=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7, 2.5]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    save=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_fp64_truth(backend, n, width, vocab, dtype, bias, entropy, temperature, softcap, save, seed):
    problem = Problem(n, width, vocab, dtype, bias, seed)
    kw = {"temperature": temperature, "softcap": softcap, "entropy": entropy}
    save = save and dtype != torch.float32
    with count_launches() as launches:
        got = problem.run(rk.token_logprobs, backend=backend, save_probs=save, **kw)
    truth = problem.run(reference.token_logprobs, lambda x: x.double(), **kw)
    same = problem.run(same_dtype, **kw)
    z = problem.hidden.double() @ problem.weight.double().T
    z = z if problem.bias is None else z + problem.bias.double()
    scale = float(z.abs().max()) / temperature if z.numel() else 0.0
    for name, a, b, c in zip(names(problem, entropy), got, truth, same, strict=True):
        assert a.dtype == (torch.float32 if name in ("logp", "entropy") else dtype)
        check_error(name, a, b, c, scale)
    assert bool(launches) == (backend == "triton" and n > 0)
    assert not bool((got[0][problem.ignored] != 0).any())
    # The log-probs' upstream gradient alone, of rows that are not ignored, decides which rows of hidden move.
    if not entropy:
        still = (problem.upstream[0] == 0) | problem.ignored
        assert not bool((got[1][still] != 0).any())


EXTRAS = ("mean_logits", "is_top1", "log_sum_sq_probs")


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=8 if INTERPRET else 40)
@given(
    n=st.sampled_from([0, 1, 17]),
    vocab=st.sampled_from([1, 33, 64, 129]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    entropy=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7]),
    softcap=st.sampled_from([None, 2.0]),
    save=st.booleans(),
    extras=st.permutations(EXTRAS).flatmap(lambda names: st.integers(1, 3).map(lambda k: tuple(names[:k]))),
    seed=st.integers(0, 2**16),
)
def test_by_products_equal_fp64_truth_and_change_nothing(
    backend, n, vocab, dtype, bias, entropy, temperature, softcap, save, extras, seed
):
    problem = Problem(n, 13, vocab, dtype, bias, seed)
    kw = {"temperature": temperature, "softcap": softcap}
    run = {**kw, "entropy": entropy, "backend": backend, "save_probs": torch.bfloat16 if save else False}
    found = []

    def with_extras(*args, **kwargs):
        out = rk.token_logprobs(*args, extras=extras, **kwargs)
        found[:] = out[1 + entropy :]
        return out[:2] if entropy else out[0]

    # What is computed anyway keeps its bits, gradients too.
    assert bits(*problem.run(with_extras, **run)) == bits(*problem.run(rk.token_logprobs, **run))
    assert not any(x.requires_grad for x in found)
    hidden, weight = problem.hidden.double(), problem.weight.double()
    bias = None if problem.bias is None else problem.bias.double()
    truth = reference.token_logprobs(hidden, weight, problem.targets, bias=bias, extras=extras, **kw)[1:]
    for name, a, b in zip(extras, found, truth, strict=True):
        assert a.dtype == (torch.bool if name == "is_top1" else torch.float32)
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_logits_the_first_is_the_top(backend):
    # The largest logit stands in three columns, of several tiles and splits.
    hidden, weight = torch.ones(3, 8, device=DEVICE), torch.zeros(150, 8, device=DEVICE)
    weight[[20, 90, 149]] = 1.0
    targets = torch.tensor([20, 90, 149], device=DEVICE)
    _, top = rk.token_logprobs(hidden, weight, targets, extras=["is_top1"], backend=backend)
    assert top.tolist() == [True, False, False]


@pytest.mark.parametrize("backend", TRITON_ONLY)  # the PyTorch path scales hidden states before its product
def test_neighbouring_logits_are_told_apart_at_every_temperature(backend):
    # A product with log₂e / temperature rounds some of these pairs to one number.
    weight, hidden = torch.zeros(150, 1, device=DEVICE), torch.ones(2, 1, device=DEVICE)
    targets = torch.tensor([20, 120], device=DEVICE)
    for x in torch.linspace(1, 2, 4 if INTERPRET else 16, device=DEVICE):
        weight[20], weight[120] = x, torch.nextafter(x, x + 1)
        _, top = rk.token_logprobs(hidden, weight, targets, temperature=0.7, extras=["is_top1"], backend=backend)
        assert top.tolist() == [False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unknown_by_product(backend):
    problem = Problem(2, 4, 8)
    with pytest.raises(ValueError, match="extras must be among mean_logits, is_top1, log_sum_sq_probs, got 'top1'"):
        rk.token_logprobs(problem.hidden, problem.weight, problem.targets, extras=["top1"], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_probabilities_kept_in_bf16_are_close(backend, softcap):
    problem = Problem(21, 24, 150, bias=True)
    kw = {"temperature": 0.8, "softcap": softcap}
    got = problem.run(rk.token_logprobs, backend=backend, save_probs=torch.bfloat16, **kw)
    truth = problem.run(reference.token_logprobs, lambda x: x.double(), **kw)
    for name, a, b in zip(names(problem, True), got, truth, strict=True):
        bound = 1e-5 if name in ("logp", "entropy") else 0.01 * float(b.abs().max())
        assert float((a - b).abs().max()) <= bound, name


def block_of(backend, hidden, vocab, role):
    """Columns that are kept together."""
    if backend == "torch":
        return _vocab_torch.BLOCK_VOCAB
    return getattr(linear_forward.tiles_of(hidden, vocab)[1], role).columns


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_share_of_the_probabilities_kept(backend, dtype, share):
    problem = Problem(21, 24, 150, dtype, bias=True, ignored=0)  # ignored rows leave only where none are kept
    kw = {"temperature": 0.8, "backend": backend}
    got = problem.run(rk.token_logprobs, save_probs=torch.bfloat16, save_share=share, **kw)
    for name, limits in (("kept", {"save_probs": torch.bfloat16}), ("computed", {})):
        whole = problem.run(rk.token_logprobs, **limits, **kw)
        block = block_of(backend, problem.hidden, 150, "full")
        border = max(1, int(150 * share) // block) * block
        side = slice(0, border) if name == "kept" else slice(border, None)
        # Each column's gradient is that of the way it was computed.
        assert bits(got[3][side], got[4][side]) == bits(whole[3][side], whole[4][side]), name
        other = slice(border, None) if name == "kept" else slice(0, border)
        assert bits(got[3][other]) != bits(whole[3][other]), name
    truth = problem.run(reference.token_logprobs, lambda x: x.double(), temperature=0.8)
    for name, a, b in zip(names(problem, True), got, truth, strict=True):
        bound = 1e-5 if name in ("logp", "entropy") else 0.01 * float(b.abs().max())
        assert float((a - b).abs().max()) <= bound, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_share_kept_is_the_memory_kept(backend):
    problem = Problem(5, 8, 600, torch.bfloat16)
    logp = rk.token_logprobs(
        problem.hidden.requires_grad_(),
        problem.weight,
        problem.targets,
        save_probs=True,
        save_share=0.5,
        backend=backend,
    )
    saved = [x for x in logp.grad_fn.saved_tensors if x is not None and x.ndim == 2 and x.shape[0] == 5]
    block = block_of(backend, problem.hidden, 600, "saving")
    kept = [5, 300 // block * block]
    assert [list(x.shape) for x in saved if x.dtype == torch.bfloat16 and x.shape[1] != 8] == [kept]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save", [False, torch.bfloat16])
def test_columns_at_minus_infinity(backend, save):
    problem = Problem(9, 8, 70, bias=True, ignored=0)
    problem.bias[torch.arange(0, 70, 3)] = -torch.inf
    problem.bias[:40] = -torch.inf  # whole tiles of them
    problem.targets.fill_(41)
    got = problem.run(rk.token_logprobs, backend=backend, save_probs=save)
    truth = problem.run(reference.token_logprobs, lambda x: x.double())
    tolerance = 1e-2 if save else 1e-5
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    problem.targets.fill_(42)
    assert bool(
        (
            rk.token_logprobs(*problem.leaves[:2], problem.targets, bias=problem.bias, backend=backend) == -torch.inf
        ).all()
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save", [False, torch.bfloat16])
def test_nan_in_rows_that_do_not_count_goes_nowhere(backend, save):
    problem = Problem(19, 8, 65, ignored=0.5)
    clean = problem.run(rk.token_logprobs, backend=backend, save_probs=save)
    problem.hidden[problem.ignored] = torch.nan
    assert bits(*problem.run(rk.token_logprobs, backend=backend, save_probs=save)) == bits(*clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    problem = Problem(33, 16, 150, torch.bfloat16, bias=True)
    first, second = (problem.run(rk.token_logprobs, backend=backend) for _ in range(2))
    assert bits(*first) == bits(*second)


def bits_change(problem, **kw) -> bool:
    """Whether a row's log-prob or entropy has other bits in parts of the batch, moved, or among other neighbours."""

    def run(hidden, targets):
        return rk.token_logprobs(hidden, problem.weight, targets, bias=problem.bias, return_entropy=True, **kw)

    whole = run(problem.hidden, problem.targets)
    n = len(problem.targets)
    # numpy multiplies for the interpreter, and adds up by a row's place in its tile; hardware does not.
    spans = [slice(i, i + length) for i in range(0, n, 16 if INTERPRET else 1) for length in (1, 3, 17)]
    moved = any(
        bits(*run(problem.hidden[rows], problem.targets[rows])) != bits(*(x[rows] for x in whole)) for rows in spans
    )
    hidden, targets = problem.hidden.clone(), problem.targets.clone()
    hidden[1::2] = hidden.flip(0)[1::2] * 3
    targets[1::2] = -100
    among_others = bits(*(x[::2] for x in run(hidden, targets))) != bits(*(x[::2] for x in whole))
    return moved or among_others


@pytest.mark.parametrize("backend", TRITON_ONLY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_bits_it_has_alone(backend, dtype):
    assert not bits_change(Problem(21, 16, 150, dtype, ignored=0), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "vocab"), [(13, 7), (24, 97)])
@pytest.mark.parametrize("kw", [{}, {"softcap": 3.0}, {"save_probs": torch.bfloat16}], ids=["", "softcap", "kept"])
def test_batch_determinism_holds_on_both_paths(backend, dtype, width, vocab, kw):
    problem = Problem(40, width, vocab, dtype, bias=True, ignored=0)
    assert not bits_change(problem, deterministic="batch", backend=backend, **kw)


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRET, reason="the PyTorch path's product on a CPU")
def test_batch_determinism_is_what_makes_the_difference():
    # One shape at which the vendor's product is known to add up otherwise for other numbers of rows.
    assert any(bits_change(Problem(40, w, v, ignored=0), backend="torch") for w, v in ((13, 7), (24, 97), (64, 300)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_determinism_changes_no_gradient_beyond_rounding(backend):
    problem = Problem(21, 16, 150, bias=True)
    got, expected = (problem.run(rk.token_logprobs, deterministic=d, backend=backend) for d in ("batch", None))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", TRITON_ONLY)
def test_many_launches_give_the_bits_of_one(backend, monkeypatch):
    problem = Problem(40, 8, 97)
    whole = problem.run(rk.token_logprobs, backend=backend)
    monkeypatch.setattr(linear_forward, "FORWARD_TOKENS", 16)
    monkeypatch.setattr(linear_backward, "DLOGITS_BYTES", 32 * 40 * 4)
    assert bits(*problem.run(rk.token_logprobs, backend=backend)[:2]) == bits(*whole[:2])
    monkeypatch.setattr(linear_backward, "BACKWARD_TOKENS", 16)
    for a, b in zip(problem.run(rk.token_logprobs, backend=backend), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_expanded_gradients(backend):
    problem = Problem(10, 12, 40, ignored=0)
    expected = rk.token_logprobs(problem.hidden, problem.weight, problem.targets, backend=backend)
    hidden = problem.hidden.T.contiguous().T.requires_grad_()
    weight = torch.cat([problem.weight, problem.weight], 1)[:, :12].requires_grad_()
    targets = torch.stack([problem.targets] * 2, 1)[:, 0].int()
    logp = rk.token_logprobs(hidden, weight, targets, backend=backend)
    if backend == "triton":
        assert bits(logp) == bits(expected)
    else:  # a vendor's product may add up in another order where the strides are others
        torch.testing.assert_close(logp, expected, rtol=2e-6, atol=2e-6)
    logp.sum().backward()  # its gradient is one number, expanded
    problem.upstream = [torch.ones(10, device=DEVICE)]
    grads = problem.run(reference.token_logprobs, lambda x: x.double(), entropy=False)[1:]
    for a, b in zip((hidden.grad, weight.grad), grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_inputs_take_no_gradient_and_no_time(backend):
    problem = Problem(5, 8, 40)
    weight, bias = problem.weight.clone().requires_grad_(), torch.zeros(40, device=DEVICE)
    with count_launches() as launches:
        hidden = problem.hidden.clone().requires_grad_()
        rk.token_logprobs(hidden, problem.weight, problem.targets, bias=bias, backend=backend).sum().backward()
        assert hidden.grad is not None
        rk.token_logprobs(problem.hidden, weight, problem.targets, backend=backend).sum().backward()
    if backend == "triton":
        assert launches == {"linear_stats": 2, "linear_merge": 2, "linear_dlogits": 2, "linear_product": 2}
    with torch.no_grad():
        assert not rk.token_logprobs(hidden, weight, problem.targets, backend=backend).requires_grad


@pytest.mark.skipif(INTERPRET, reason="fp64 is for the PyTorch path")
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in ((5, 4), (9, 4), (9,))]
    targets = torch.tensor([0, 8, -100, 3, 3])

    def f(hidden, weight, bias):
        return rk.token_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=0.7,
            softcap=softcap,
            return_entropy=True,
            backend="torch",
        )

    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    problem = Problem(5, 8, 40, bias=True)
    leaves = [x.requires_grad_() for x in problem.leaves]
    args = (*leaves[:2], problem.targets, leaves[2], 0.9, 0.0, -100)
    for entropy, save in ((False, 0.0), (True, 1.0), (True, 0.5)):
        asked = [entropy, True, save == 0.5]
        torch.library.opcheck(module._linear_logprob, (*args, entropy, save, save == 0.5, backend, asked))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    problem = Problem(6, 8, 40, bias=True)

    def f(hidden, weight, targets, **kw):
        logp, entropy = rk.token_logprobs(hidden * 2, weight, targets, **{**kw, "backend": backend})
        return logp * 3, entropy

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(problem.run(compiled), problem.run(f), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_outside_the_vocabulary(backend, monkeypatch):
    problem = Problem(4, 8, 40, ignored=0)
    problem.targets[:2] = torch.tensor([40, -3])
    args = problem.hidden, problem.weight, problem.targets
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"targets must be in \[0, 40\)"):
            rk.token_logprobs(*args, backend=backend)
    monkeypatch.setattr(module, "values_checked", lambda tensor: False)
    logp = rk.token_logprobs(*args, backend=backend)
    assert logp.isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden must have shape \[N, H\]"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int32)}, "hidden must have dtype"),
        ({"weight": torch.zeros(7, 5)}, r"weight must have shape \[V, 4\]"),
        ({"weight": torch.zeros(7, 4, dtype=torch.bfloat16)}, "weight must have dtype float32"),
        ({"weight": torch.zeros(0, 4)}, "at least one row"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets must have shape \[3\]"),
        ({"targets": torch.zeros(3)}, "targets must have dtype"),
        ({"bias": torch.zeros(8)}, r"bias must have shape \[7\]"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"softcap": -1.0}, "softcap must be a positive number"),
        ({"save_probs": True}, "pass save_probs=torch.bfloat16"),
        ({"save_probs": torch.float16}, "save_probs must be"),
        ({"save_probs": torch.bfloat16, "save_share": 0.0}, r"save_share must be in \(0, 1\]"),
        ({"backend": "cuda"}, "backend must be"),
        ({"deterministic": True}, "deterministic must be None or 'batch', got True"),
    ],
)
def test_bad_input_is_named(backend, change, message):
    good = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
    }
    given = {**good, "backend": backend, **change}
    on_device = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        rk.token_logprobs(**on_device)


def test_fp32_products_keep_fp32():
    # The interpreter multiplies in full fp32 and cannot reveal TF32: the choice itself is what can be
    # asserted.
    assert linear_forward.precision_of(torch.float32) == "tf32x3"


def test_tiles_do_not_depend_on_the_tokens():
    def shapes(n):
        return linear_forward.tiles_of(torch.empty(n, 64, dtype=torch.bfloat16), 1000)

    assert shapes(1) == shapes(5000)
    assert _dispatch.resolve_backend("torch", torch.empty(1)) == "torch"
