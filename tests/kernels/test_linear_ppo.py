"""fused_linear_ppo_loss against fp64 truth: loss, statistics and every gradient, whole and in chunks."""

import math

import pytest
import rto_kernels as rk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import BACKENDS, DEVICE, KINDS, bits, check_error, layouts, sample
from rto_kernels import linear_ppo as module
from rto_kernels import reference
from rto_kernels._dispatch import INTERPRET, count_launches


class Problem:
    """A ragged batch of hidden states with what PPO needs beside them; NaN outside the mask."""

    def __init__(self, layout, width, vocab, dtype=torch.float32, bias=True):
        self.layout, g = layout, layout.generator

        def new(*shape, scale=1.0):
            return (torch.randn(shape, generator=g) * scale).to(dtype).to(DEVICE)

        self.hidden, self.weight = new(*layout.shape, width), new(vocab, width, scale=width**-0.5)
        self.bias = new(vocab) if bias else None
        targets = torch.randint(0, vocab, layout.shape, generator=g).to(DEVICE)
        with torch.no_grad():
            logp = reference.token_logprobs(*(x.double() for x in (self.hidden, self.weight)), targets)
        self.old_logp = (logp.float() + layout.tokens(scale=0.3)).float()
        self.sampler_logp = self.old_logp + layout.tokens(scale=0.3)
        self.advantages = layout.tokens()
        self.advantages[torch.rand(layout.shape, generator=g).to(DEVICE) < 0.2] = 0
        self.targets = targets
        if layout.mask is not None:
            outside = layout.mask == 0
            self.hidden[outside] = torch.nan
            self.targets = targets.masked_fill(outside, 10**6)

    @property
    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def run(self, function, convert=lambda x: x, upstream=1.7, **kw):
        """[loss, logp, statistics…, gradients…] of `function` on converted copies of the inputs."""
        leaves = [convert(x).detach().requires_grad_() for x in self.leaves]
        bias = leaves[2] if self.bias is not None else None
        row = [convert(x) for x in (self.old_logp, self.advantages)]
        if "is_cap" in kw:
            kw["sampler_logp"] = convert(self.sampler_logp)
        out = function(*leaves[:2], self.targets, *row, bias=bias, **self.layout.kw, **kw)
        grads = torch.autograd.grad(out.policy_loss * upstream, leaves)
        return [out.policy_loss.detach(), out.logp.detach(), *out.stats, *grads]


def wide(x):
    return x.double().nan_to_num(0)


def plain(function):
    """The twin of the whole written as usual: the logits in the inputs' dtype."""

    def f(hidden, weight, targets, old_logp, advantages, **kw):
        return function(
            *(x.nan_to_num(0) for x in (hidden,)),
            weight,
            targets,
            *(x.nan_to_num(0) for x in (old_logp, advantages)),
            **kw,
        )

    return f


NAMES = ["policy_loss", "logp", *rk.PPOStats._fields, "d(hidden)", "d(weight)", "d(bias)"]


def check(problem, got, dtype, **kw):
    truth = problem.run(reference.fused_linear_ppo_loss, wide, **kw)
    same = problem.run(plain(reference.fused_linear_ppo_loss), lambda x: x, **kw)
    for name, a, b, c in zip(NAMES, got, truth, same, strict=False):
        if name == "entropy" and not kw.get("entropy_coef"):
            continue  # not computed unless the loss or the caller asks for it
        check_error(name, a, b, c.nan_to_num(0), scale=8)


OPTIONS = {
    "temperature": st.sampled_from([1.0, 0.7]),
    "softcap": st.sampled_from([None, 5.0]),
    "clip": st.sampled_from([0.2, (0.1, 0.3), None]),
    "entropy_coef": st.sampled_from([0.0, 0.1]),
    "is_cap": st.sampled_from([None, 1.2]),
    "aggregation": st.sampled_from(["sequence", "token"]),
    "denominator": st.sampled_from([None, 7.0]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=6 if INTERPRET else 60)
@given(
    layout=layouts(),
    width=st.sampled_from([5, 8]),
    vocab=st.sampled_from([1, 40, 70]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kw=st.fixed_dictionaries(OPTIONS),
)
def test_equals_fp64_truth(backend, layout, width, vocab, dtype, kw):
    problem = Problem(layout, width, vocab, dtype)
    kw = {k: v for k, v in kw.items() if v is not None or k == "clip"}
    with count_launches() as launches:
        got = problem.run(rk.fused_linear_ppo_loss, backend=backend, **kw)
    # Without tokens the vocabulary is not passed, but the losses' statistics may still be asked for.
    del launches["ppo_loss"], launches["scale"]
    assert bool(launches) == (backend == "triton" and problem.targets.numel() > 0)
    check(problem, got, dtype, **kw)
    if layout.mask is not None:
        assert not bool((got[NAMES.index("d(hidden)")][layout.mask == 0] != 0).any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_add_up(backend, dtype, monkeypatch):
    problem = Problem(sample("packed_masked"), 8, 40, dtype)
    passes = module.linear_passes(backend)
    monkeypatch.setattr(module, "linear_passes", lambda _: passes._replace(chunk_tokens=lambda vocab: 20))
    check(problem, problem.run(rk.fused_linear_ppo_loss, backend=backend), dtype)
    check(
        problem,
        problem.run(rk.fused_linear_ppo_loss, backend=backend, entropy_coef=0.1),
        dtype,
        entropy_coef=0.1,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["packed", "full"])
@pytest.mark.parametrize("chunk", [None, 16])
def test_bf16_without_bias_has_no_pass_between_forward_and_products(backend, temperature, kind, chunk, monkeypatch):
    """The factored backward pass: no kernel of d(logits) runs, results are the truth's; ignored rows are NaN."""
    problem = Problem(sample(kind), 8, 70, torch.bfloat16, bias=False)
    ignored = torch.rand(problem.targets.shape, generator=problem.layout.generator).to(DEVICE) < 0.3
    problem.targets[ignored] = -100
    problem.hidden[ignored] = torch.nan
    if chunk:
        passes = module.linear_passes(backend)
        monkeypatch.setattr(module, "linear_passes", lambda _: passes._replace(chunk_tokens=lambda vocab: chunk))
    kw = {"temperature": temperature, "clip": (0.1, 0.3)}
    with count_launches() as launches:
        got = problem.run(rk.fused_linear_ppo_loss, backend=backend, **kw)
    if backend == "triton":
        assert launches["linear_factor"] > 0
        assert not any("dlogits" in name for name in launches)
    check(problem, got, torch.bfloat16, **kw)
    # The largest element's error says little of small gradients: the whole's relative one does.
    truth = problem.run(reference.fused_linear_ppo_loss, wide, **kw)
    same = problem.run(plain(reference.fused_linear_ppo_loss), lambda x: x, **kw)
    for name in ("d(hidden)", "d(weight)"):
        ours, exact, eager = (x[NAMES.index(name)].double().nan_to_num(0) for x in (got, truth, same))
        error, bound = ((x - exact).norm() / exact.norm() for x in (ours, eager))
        # The interpreter truncates to bf16 where hardware rounds.
        slack = 1.2e-2 if INTERPRET else 4e-3
        assert error <= 1.1 * bound + slack, f"{name}: {error:.2g}, eager {bound:.2g}"
    d_hidden = got[NAMES.index("d(hidden)")]
    assert not bool((d_hidden[ignored] != 0).any())
    assert bool((d_hidden[~ignored] != 0).any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_parts(backend, kind):
    problem = Problem(sample(kind), 8, 40)
    one = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    kw = {"whiten": (one, one + 1), "backend": backend}
    got = problem.run(rk.fused_linear_ppo_loss, **kw)

    def parts(hidden, weight, targets, old_logp, advantages, *, bias, backend, mask=None, cu_seqlens=None, **kw):
        seen = targets if mask is None else torch.where(mask != 0, targets, -100)
        logp = rk.token_logprobs(hidden.flatten(0, -2), weight, seen.flatten(), bias=bias, backend=backend)
        logp = logp.view(targets.shape)
        loss = rk.ppo_loss(logp, old_logp, advantages, mask=mask, cu_seqlens=cu_seqlens, backend=backend, **kw)
        return module.LinearPPOLoss(loss.policy_loss, logp, logp, loss.stats)

    for name, a, b in zip(NAMES, got, problem.run(parts, **kw), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_with_a_denominator_sum_to_the_batch(backend):
    problem = Problem(sample("full"), 8, 40)
    whole = problem.run(rk.fused_linear_ppo_loss, backend=backend)
    total = None
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        hidden, weight, bias = (x.detach().requires_grad_() for x in problem.leaves)
        out = rk.fused_linear_ppo_loss(
            hidden[rows], weight, *(x[rows] for x in (problem.targets, problem.old_logp, problem.advantages)),
            bias=bias, denominator=torch.tensor(5.0, device=DEVICE), backend=backend,
        )  # fmt: skip
        part = [out.policy_loss.detach(), *torch.autograd.grad(out.policy_loss * 1.7, (hidden, weight, bias))]
        total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
    for a, b in zip(total, [whole[0], *whole[-3:]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    problem = Problem(sample("gaps"), 8, 40, torch.bfloat16)
    first, second = (problem.run(rk.fused_linear_ppo_loss, backend=backend) for _ in range(2))
    assert bits(*first) == bits(*second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_determinism(backend, monkeypatch):
    """A token's log-prob and entropy have the same bits alone, and in chunks of another size."""
    problem = Problem(sample("packed"), 13, 7)
    kw = {"bias": problem.bias, "return_entropy": True, "deterministic": "batch", "backend": backend}
    row = problem.hidden, problem.targets, problem.old_logp, problem.advantages

    def run(rows, ends):
        hidden, *rest = (x[rows] for x in row)
        ends = torch.tensor(ends, device=DEVICE)
        out = rk.fused_linear_ppo_loss(hidden, problem.weight, *rest, cu_seqlens=ends, **kw)
        return out.logp, out.entropy

    whole = run(slice(None), [0, 17, 56])
    step = 16 if INTERPRET else 5  # numpy, the interpreter's product, adds up by a row's place in the tile
    for rows in (slice(0, 17), slice(step, step + 1), slice(2 * step, 56)):
        assert bits(*run(rows, [0, rows.stop - rows.start])) == bits(*(x[rows] for x in whole))
    passes = module.linear_passes(backend)
    monkeypatch.setattr(module, "linear_passes", lambda _: passes._replace(chunk_tokens=lambda vocab: 4 * step))
    assert bits(*run(slice(None), [0, 17, 56])) == bits(*whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_kept_without_a_copy_and_used_once(backend):
    problem = Problem(sample("packed"), 8, 40)
    leaves = [x.detach().requires_grad_() for x in problem.leaves]
    row = problem.targets, problem.old_logp, problem.advantages
    out = rk.fused_linear_ppo_loss(*leaves[:2], *row, bias=leaves[2], **problem.layout.kw, backend=backend)
    kept = out.policy_loss.grad_fn.saved_tensors[1].data_ptr()
    out.policy_loss.backward(retain_graph=True)
    assert leaves[1].grad.data_ptr() == kept
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.policy_loss.backward()
    with torch.no_grad():
        assert not rk.fused_linear_ppo_loss(
            *leaves[:2], *row, **problem.layout.kw, backend=backend
        ).policy_loss.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_is_returned_when_asked_for(backend):
    problem = Problem(sample("left"), 8, 40)
    args = (problem.hidden, problem.weight, problem.targets, problem.old_logp, problem.advantages)
    out = rk.fused_linear_ppo_loss(*args, return_entropy=True, **problem.layout.kw, backend=backend)
    truth = reference.fused_linear_ppo_loss(
        *(wide(x) if x.is_floating_point() else x for x in args), return_entropy=True, **problem.layout.kw
    )
    torch.testing.assert_close(out.entropy.double(), truth.entropy, rtol=1e-5, atol=1e-6)
    assert rk.fused_linear_ppo_loss(*args, **problem.layout.kw, backend=backend).entropy.numel() == 0


@pytest.mark.skipif(INTERPRET, reason="fp64 is for the PyTorch path")
def test_gradcheck():
    layout = sample("packed")
    problem = Problem(layout, 4, 12, torch.float64)
    row = problem.targets, problem.old_logp.double(), problem.advantages.double()
    leaves = [x.detach().requires_grad_() for x in problem.leaves]

    def f(hidden, weight, bias):
        return rk.fused_linear_ppo_loss(
            hidden,
            weight,
            *row,
            bias=bias,
            temperature=0.9,
            softcap=4.0,
            entropy_coef=0.1,
            clip=None,
            backend="torch",
            **layout.kw,
        ).policy_loss

    # Perturbed one at a time, since the gradients of a call can be used once.
    expected = torch.autograd.grad(f(*leaves), leaves)
    generator = torch.Generator().manual_seed(0)
    for i, grad in enumerate(expected):
        step = torch.randn(grad.shape, generator=generator, dtype=torch.float64).to(DEVICE) * 1e-6
        moved = [[x + s * step if j == i else x for j, x in enumerate(leaves)] for s in (1, -1)]
        slope = float(f(*moved[0]) - f(*moved[1])) / 2
        assert slope == pytest.approx(float((grad * step).sum()), rel=1e-5, abs=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_one_graph(backend):
    problem = Problem(sample("packed"), 8, 40)
    hidden, weight, bias = problem.leaves
    torch.library.opcheck(
        module._linear_ppo,
        (hidden, weight, bias, problem.targets, problem.old_logp, problem.advantages, None, None, None,
         problem.layout.cu_seqlens, None, None, 1.0, 0.0, -100, 0.2, 0.2, math.inf, 2.0, 0.0, "sequence", False,
         [True, True, True], False, backend),
    )  # fmt: skip

    def f(hidden, weight, targets, old_logp, advantages, **kw):
        out = rk.fused_linear_ppo_loss(hidden * 2, weight, targets, old_logp, advantages, **{**kw, "backend": backend})
        return module.LinearPPOLoss(out.policy_loss * 3, out.logp, out.entropy, out.stats)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(problem.run(compiled), problem.run(f), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(6, 4)}, r"hidden must have shape \[B, T, H\]"),
        ({"targets": torch.zeros(2, 2, dtype=torch.int64)}, r"targets must have shape \[2, 3\]"),
        ({"weight": torch.zeros(7, 5)}, r"weight must have shape \[V, 4\]"),
        ({"old_logp": torch.zeros(2, 2)}, "old_logp must have shape"),
        ({"advantages": torch.zeros(6)}, "advantages must have shape"),
        ({"mask": torch.zeros(2, 2)}, "mask must have shape"),
        ({"aggregation": "mean"}, "aggregation must be"),
        ({"clip": -0.1}, "clip must not be negative"),
    ],
)
def test_bad_input_is_named(backend, change, message):
    row = torch.zeros(2, 3)
    good = {
        "hidden": torch.zeros(2, 3, 4),
        "weight": torch.zeros(7, 4),
        "targets": row.long(),
        "old_logp": row,
        "advantages": row,
    }
    given = {**good, "backend": backend, **change}
    on_device = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        rk.fused_linear_ppo_loss(**on_device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_gradients_are_refused_with_the_way_out(backend):
    row = torch.zeros(2, 3, device=DEVICE)
    hidden, weight = (
        torch.zeros(s, dtype=torch.float16, device=DEVICE, requires_grad=True) for s in ((2, 3, 8), (7, 8))
    )
    with pytest.raises(ValueError, match="token_logprobs followed by ppo_loss takes float16"):
        rk.fused_linear_ppo_loss(hidden, weight, row.long(), row, row, backend=backend)
    with torch.no_grad():
        out = rk.fused_linear_ppo_loss(hidden, weight, row.long(), row, row, backend=backend)
    assert out.policy_loss.isfinite()
