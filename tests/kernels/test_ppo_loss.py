"""ppo_loss and gae_ppo_loss: losses, statistics and every gradient against scalar fp64 arithmetic."""

import math

import pytest
import rto_kernels as rk
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import BACKENDS, DEVICE, DTYPES, KINDS, bits, build, check_error, largest, layouts, sample
from rto_kernels import reference
from rto_kernels._dispatch import count_launches
from rto_kernels._ppo_arguments import Batch, Settings, Whitening

INF = float("inf")


def truth(layout, given, *, clip, value_clip, whiten, entropy_coef, is_cap, aggregation, denominator, up):
    """(policy_loss, value_loss, {name: gradient of up[0]·policy + up[1]·value}, stats), token by token."""
    x = {k: None if t is None else t.detach().double().reshape(-1).tolist() for k, t in given.items()}
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    low, high = (1 - low if low else -INF), (1 + high if high else INF)
    full = [inside for inside in layout.inside if inside]
    units = len(full) if aggregation == "sequence" else sum(map(len, full))
    total = float(denominator) if denominator is not None else max(units, 1)
    n = math.prod(layout.shape)
    grads = {name: [0.0] * n for name in ("logp", "values", "entropy")}
    policy, value, stats = [], [], {name: [0.0] for name in rk.PPOStats._fields}
    for inside in full:
        c = 1 / (len(inside) * total) if aggregation == "sequence" else 1 / total
        for i in inside:
            log_ratio = x["logp"][i] - x["old_logp"][i]
            ratio = math.exp(log_ratio)
            a = x["advantages"][i]
            if whiten is not None:
                a = (a - float(whiten[0])) * float(whiten[1])
            raw = math.exp(x["old_logp"][i] - x["sampler_logp"][i]) if x["sampler_logp"] else 1.0
            w = min(raw, is_cap or INF)
            unclipped, clipped = ratio * a, min(max(ratio, low), high) * a
            policy.append(-c * w * min(unclipped, clipped))
            if unclipped <= clipped:
                grads["logp"][i] = -up[0] * c * w * a * ratio
            stats["clip_low"].append(c * (a < 0 and ratio < low))
            stats["clip_high"].append(c * (a > 0 and ratio > high))
            stats["ratio_mean"].append(c * ratio)
            stats["ratio_max"] = [max(stats["ratio_max"][0], ratio)]
            stats["kl_k1"].append(-c * log_ratio)
            stats["kl_k3"].append(c * (ratio - 1 - log_ratio))
            stats["is_weight"].append(c * w)
            stats["is_capped"].append(c * (raw > (is_cap or INF)))
            if x["entropy"] is not None:
                policy.append(-entropy_coef * c * x["entropy"][i])
                grads["entropy"][i] = -up[0] * entropy_coef * c
                stats["entropy"].append(c * x["entropy"][i])
            if x["values"] is not None:
                v, target = x["values"][i], x["returns"][i]
                half, slope = 0.5 * (v - target) ** 2, v - target
                if value_clip:
                    moved = v - x["old_values"][i]
                    bounded = x["old_values"][i] + max(-value_clip, min(value_clip, moved))
                    if abs(moved) > value_clip and 0.5 * (bounded - target) ** 2 > half:
                        half, slope = 0.5 * (bounded - target) ** 2, 0.0
                        stats["value_clip"].append(c)
                value.append(c * half)
                grads["values"][i] = up[1] * c * slope
                stats["value_mean"].append(c * v)
                stats["return_mean"].append(c * target)
                stats["return_sq"].append(c * target**2)
                stats["error_mean"].append(c * (target - v))
                stats["error_sq"].append(c * (target - v) ** 2)
    grads = {k: torch.tensor(g, dtype=torch.float64).reshape(layout.shape) for k, g in grads.items()}
    return math.fsum(policy), math.fsum(value), grads, {k: math.fsum(s) for k, s in stats.items()}


NAMES = ("logp", "old_logp", "advantages", "values", "old_values", "returns", "entropy", "sampler_logp")


def draw_inputs(layout, dtype, with_values, with_entropy, with_sampler):
    # Log-probs a few tenths apart, so that ratios fall on both sides of the clip bounds.
    given = {name: layout.tokens(dtype, 0.3 if "logp" in name else 1.0) for name in NAMES}
    for name in ("values", "old_values", "returns") if not with_values else ():
        given[name] = None
    if not with_entropy:
        given["entropy"] = None
    if not with_sampler:
        given["sampler_logp"] = None
    for name in ("logp", "values", "entropy"):
        if given[name] is not None:
            given[name].requires_grad_()
    return given


def run(function, inputs, up, **kw):
    """(loss, gradients of up[0]·policy_loss + up[1]·value_loss) of a ppo_loss."""
    inputs = {k: t if t is None else t.detach().clone().requires_grad_(t.requires_grad) for k, t in inputs.items()}
    positional = [inputs[name] for name in NAMES[:6]]
    out = function(*positional, entropy=inputs["entropy"], sampler_logp=inputs["sampler_logp"], **kw)
    (out.policy_loss * up[0] + out.value_loss * up[1]).backward()
    return out, {name: inputs[name].grad for name in ("logp", "values", "entropy") if inputs[name] is not None}


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    layout=layouts(),
    dtype=st.sampled_from(DTYPES),
    with_values=st.booleans(),
    with_entropy=st.booleans(),
    with_sampler=st.booleans(),
    whitened=st.booleans(),
    clip=st.sampled_from([0.2, None, 0.0, (0.1, 0.3), (None, 0.2), (0.2, 0.0)]),
    value_clip=st.sampled_from([0.3, None, 0.0]),
    is_cap=st.sampled_from([1.3, None]),
    aggregation=st.sampled_from(["sequence", "token"]),
    denominator=st.sampled_from([None, 7, 2.5, "scalar"]),
    up=st.sampled_from([(1.0, 0.5), (-0.37, 2.3)]),
)
def test_equals_the_formula(
    backend, layout, dtype, with_values, with_entropy, with_sampler, whitened, clip, value_clip, is_cap,
    aggregation, denominator, up,
):  # fmt: skip
    inputs = draw_inputs(layout, dtype, with_values, with_entropy, with_sampler)
    mean_rstd = torch.tensor([0.3, 1.7], dtype=torch.float64, device=DEVICE).unbind() if whitened else None
    if denominator == "scalar":
        denominator = torch.tensor(9, device=DEVICE)
    kw = {
        "clip": clip,
        "value_clip": value_clip,
        "whiten": mean_rstd,
        "entropy_coef": 0.1 if with_entropy else 0.0,
        "is_cap": is_cap if with_sampler else None,
        "aggregation": aggregation,
        "denominator": denominator,
    }
    out, grads = run(rk.ppo_loss, inputs, up, backend=backend, **kw, **layout.kw)
    same, same_grads = run(reference.ppo_loss, inputs, up, **kw, **layout.kw)
    policy, value, true_grads, stats = truth(layout, inputs, up=up, **kw)
    scale = largest(*inputs.values())
    check_error("policy_loss", out.policy_loss, policy, same.policy_loss, scale)
    check_error("value_loss", out.value_loss, value, same.value_loss, scale**2)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        same_grad = torch.zeros(layout.shape) if same_grads[name] is None else same_grads[name]
        check_error(f"d{name}", grad, true_grads[name], same_grad, scale)
    assert layout.outside_is_zero(*grads.values())
    for name, stat in out.stats._asdict().items():
        check_error(name, stat, stats[name], getattr(same.stats, name), scale**2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_launches(backend):
    layout = sample("packed")
    inputs = draw_inputs(layout, torch.float32, True, True, True)
    with count_launches() as launches:
        run(rk.ppo_loss, inputs, (1.0, 1.0), entropy_coef=0.1, **layout.kw, backend=backend)
    assert launches == ({"ppo_loss": 1, "ppo_loss_backward": 2} if backend == "triton" else {})
    x = [layout.tokens() for _ in range(5)]
    with count_launches() as launches:
        rk.gae_ppo_loss(*x, **layout.kw, backend=backend)
    assert launches == ({"gae": 1, "ppo_loss": 1} if backend == "triton" else {})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_every_time(backend, kind):
    layout = sample(kind)
    inputs = draw_inputs(layout, torch.float32, True, True, True)
    seen = []
    for _ in range(2):
        out, grads = run(rk.ppo_loss, inputs, (1.3, 0.7), entropy_coef=0.1, is_cap=1.2, **layout.kw, backend=backend)
        seen.append(bits(out.policy_loss, out.value_loss, *out.stats, *grads.values()))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_micro_batches_sum_to_the_batch(backend, aggregation):
    lengths = [9, 0, 20, 1, 33, 4]
    whole = build("packed", lengths, 0, 3)
    inputs = draw_inputs(whole, torch.float32, True, True, True)
    units = 5 if aggregation == "sequence" else sum(lengths)
    kw = {"entropy_coef": 0.1, "is_cap": 1.3, "aggregation": aggregation, "backend": backend}
    out, grads = run(rk.ppo_loss, inputs, (1.0, 1.0), **kw, **whole.kw)
    losses, parts = [], []
    for rows in ((0, 2), (2, 4), (4, 6)):
        a, b = int(whole.cu_seqlens[rows[0]]), int(whole.cu_seqlens[rows[1]])
        part = {k: t.detach()[a:b].requires_grad_(t.requires_grad) for k, t in inputs.items()}
        cu_seqlens = whole.cu_seqlens[rows[0] : rows[1] + 1] - a
        micro, micro_grads = run(
            rk.ppo_loss, part, (1.0, 1.0), **kw, denominator=torch.tensor(units, device=DEVICE), cu_seqlens=cu_seqlens
        )
        losses.append(micro)
        parts.append(micro_grads)
    for name in ("policy_loss", "value_loss"):
        torch.testing.assert_close(sum(getattr(m, name) for m in losses), getattr(out, name), rtol=1e-6, atol=1e-7)
    for name, grad in grads.items():
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), grad, rtol=1e-6, atol=1e-9)
    for name, stat in out.stats._asdict().items():
        merge = max if name == "ratio_max" else sum
        torch.testing.assert_close(merge(getattr(m.stats, name) for m in losses), stat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_advantage_is_exactly_zero_where_the_ratio_overflows(backend):
    logp = torch.tensor([[500.0, 500.0, 0.1]], device=DEVICE, requires_grad=True)
    advantages = torch.tensor([[0.0, 2.0, 1.0]], device=DEVICE)
    out = rk.ppo_loss(logp, torch.zeros(1, 3, device=DEVICE), advantages, aggregation="token", backend=backend)
    out.policy_loss.backward()
    torch.testing.assert_close(out.policy_loss.item(), -(1.2 * 2 + math.exp(0.1)) / 3)
    assert logp.grad[0, :2].tolist() == [0, 0]  # no gain; and clipped from above
    assert logp.grad[0, 2] != 0
    off = rk.ppo_loss(logp, torch.zeros(1, 3, device=DEVICE), advantages * 0, clip=None, backend=backend)
    assert off.policy_loss == 0
    # Nor where the importance weight overflows.
    logp = torch.zeros(1, 3, device=DEVICE, requires_grad=True)
    sampler = torch.tensor([[-500.0, 0.0, 0.0]], device=DEVICE)
    for function in (rk.ppo_loss, reference.ppo_loss):
        kw = {"backend": backend} if function is rk.ppo_loss else {}
        out = function(logp, torch.zeros(1, 3, device=DEVICE), advantages, sampler_logp=sampler, **kw)
        (grad,) = torch.autograd.grad(out.policy_loss, logp)
        torch.testing.assert_close(out.policy_loss.item(), -1.0)
        torch.testing.assert_close(grad, torch.tensor([[0.0, -2 / 3, -1 / 3]], device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_zero_losses(backend):
    nan = torch.full((2, 3), float("nan"), device=DEVICE)
    logp, values = nan.clone().requires_grad_(), nan.clone().requires_grad_()
    out = rk.ppo_loss(logp, nan, nan, values, nan, nan, mask=torch.zeros(2, 3, device=DEVICE), backend=backend)
    (out.policy_loss + out.value_loss).backward()
    assert (out.policy_loss, out.value_loss) == (0, 0)
    assert (logp.grad == 0).all()
    assert (values.grad == 0).all()
    assert all(stat == 0 for stat in out.stats)
    none = torch.empty(0, device=DEVICE, requires_grad=True)
    for batch in (0, 3):
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int64, device=DEVICE)
        out = rk.ppo_loss(none, none.detach(), none.detach(), cu_seqlens=cu_seqlens, backend=backend)
        out.policy_loss.backward()
        assert out.policy_loss == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_backpropagate_apart_and_only_where_needed(backend):
    layout = sample("gaps")
    inputs = draw_inputs(layout, torch.float32, True, True, False)
    kw = {"entropy_coef": 0.1, **layout.kw, "backend": backend}
    _, together = run(rk.ppo_loss, inputs, (1.0, 1.0), **kw)
    logp, values = (inputs[n].detach().requires_grad_() for n in ("logp", "values"))
    frozen = {"entropy": inputs["entropy"].detach()}
    rest = [inputs[n] for n in ("old_logp", "advantages")], [inputs[n] for n in ("old_values", "returns")]
    out = rk.ppo_loss(logp, *rest[0], values, *rest[1], **frozen, **kw)
    out.value_loss.backward()
    assert logp.grad is None
    out.policy_loss.backward()
    assert bits(logp.grad, values.grad) == bits(together["logp"], together["values"])
    with torch.no_grad():
        assert not rk.ppo_loss(logp, *rest[0], values, *rest[1], **frozen, **kw).policy_loss.requires_grad
    critic_only = rk.ppo_loss(logp.detach(), *rest[0], values, *rest[1], **frozen, **kw)
    assert not critic_only.policy_loss.requires_grad
    assert critic_only.value_loss.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient_may_be_expanded_and_inputs_strided(backend):
    layout = sample("gaps")
    inputs = draw_inputs(layout, torch.float32, True, False, False)
    _, expected = run(rk.ppo_loss, inputs, (1.0, 1.0), **layout.kw, backend=backend)
    logp = inputs["logp"].detach().T.contiguous().T.requires_grad_()
    values = inputs["values"].detach().T.contiguous().T.requires_grad_()
    others = [inputs[n].T.contiguous().T for n in ("old_logp", "advantages", "old_values", "returns")]
    out = rk.ppo_loss(logp, *others[:2], values, *others[2:], **layout.kw, backend=backend)
    torch.stack([out.policy_loss, out.value_loss]).expand(3, 2).sum().backward()
    torch.testing.assert_close(logp.grad, expected["logp"] * 3)
    torch.testing.assert_close(values.grad, expected["values"] * 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whiten", [True, False])
def test_gae_ppo_loss_is_its_parts(backend, kind, whiten):
    layout = sample(kind)
    logp, values = layout.tokens(scale=0.3).requires_grad_(), layout.tokens().requires_grad_()
    old_logp, rewards, old_values = layout.tokens(scale=0.3), layout.tokens(), layout.tokens()
    kw = {"gamma": 0.9, "lam": 0.8, "gaps": "carry", "bootstrap": layout.sequences()}
    loss, estimate = rk.gae_ppo_loss(
        logp, old_logp, rewards, old_values, values, whiten=whiten, **kw, **layout.kw, backend=backend
    )
    apart = rk.gae(rewards, old_values, **kw, **layout.kw, backend=backend)
    parts = rk.ppo_loss(
        logp, old_logp, apart.advantages, values, old_values, apart.returns,
        whiten=rk.whiten_moments(apart.moments) if whiten else None, **layout.kw, backend=backend,
    )  # fmt: skip
    assert bits(*estimate) == bits(*apart)
    torch.testing.assert_close(loss[:2], parts[:2], rtol=1e-6, atol=1e-7)
    grads = torch.autograd.grad(loss.policy_loss + loss.value_loss, (logp, values))
    torch.testing.assert_close(grads, torch.autograd.grad(parts.policy_loss + parts.value_loss, (logp, values)))
    twin = reference.gae_ppo_loss(logp, old_logp, rewards, old_values, values, whiten=whiten, **kw, **layout.kw)
    torch.testing.assert_close(loss[:2], twin[0][:2], rtol=1e-5, atol=1e-6)


def test_gradcheck_in_fp64():
    layout = sample("gaps")
    inputs = draw_inputs(layout, torch.float64, True, True, True)
    rest = {k: t.detach().nan_to_num() for k, t in inputs.items() if k not in ("logp", "values", "entropy")}
    free = [inputs[k].detach().nan_to_num().requires_grad_() for k in ("logp", "values", "entropy")]

    def losses(logp, values, entropy):
        return rk.ppo_loss(
            logp, rest["old_logp"], rest["advantages"], values, rest["old_values"], rest["returns"],
            entropy=entropy, entropy_coef=0.1, sampler_logp=rest["sampler_logp"], is_cap=1.2, clip=(0.1, 0.3),
            mask=layout.mask, backend="torch",
        )[:2]  # fmt: skip

    assert torch.autograd.gradcheck(losses, free)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["packed", "gaps"])
def test_operators(backend, kind):
    layout = sample(kind)
    x = [layout.tokens().nan_to_num() for _ in range(8)]
    batch = Batch(layout.cu_seqlens, layout.mask, None)
    options = Settings(0.2, 0.2, 0.2, INF, 0.1, "sequence")
    for with_grads in (True, False):
        torch.library.opcheck(torch.ops.rto_kernels.ppo_loss, (*x, *Whitening(), *batch, *options, with_grads, backend))
    scalars = torch.rand((), device=DEVICE), torch.rand((), device=DEVICE)
    torch.library.opcheck(
        torch.ops.rto_kernels.ppo_loss_backward,
        (x[0], x[1], *scalars, torch.bfloat16, torch.float32, backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend):
    layout = sample("packed")
    logp, values = layout.tokens().requires_grad_(), layout.tokens().requires_grad_()
    rest = [layout.tokens() for _ in range(3)]

    def caller(logp, values, cu_seqlens):
        loss, estimate = rk.gae_ppo_loss(
            logp * 1, *rest, values * 1, cu_seqlens=cu_seqlens, denominator=4.0, backend=backend
        )
        return loss.policy_loss + 0.5 * loss.value_loss, loss.stats.kl_k3, estimate.returns

    got = torch.compile(caller, fullgraph=True, backend="aot_eager")(logp, values, layout.cu_seqlens)
    expected = caller(logp, values, layout.cu_seqlens)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got[0], (logp, values)), torch.autograd.grad(expected[0], (logp, values))
    )


def test_explained_variance():
    generator = torch.Generator().manual_seed(0)
    values, returns = (torch.randn(1, 200, generator=generator) for _ in range(2))
    returns = returns + 2 * values
    zero = torch.zeros(1, 200)
    stats = rk.ppo_loss(zero, zero, zero, values, values, returns, backend="torch").stats
    expected = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    torch.testing.assert_close(stats.explained_variance(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_held_back_by_its_clip_has_no_gradient(backend):
    """0.5·max((v − R)², (clipped v − R)²): where the clipped branch is the larger, v does not move it."""
    zero = torch.zeros(1, 4, device=DEVICE)
    values = torch.tensor([[0.1, 1.0, 1.0, -1.0]], device=DEVICE, requires_grad=True)
    returns = torch.tensor([[2.0, 2.0, -2.0, -2.0]], device=DEVICE)  # inside; cut; away from R; cut
    logp = zero.clone().requires_grad_()
    out = rk.ppo_loss(logp, zero, zero, values, zero, returns, value_clip=0.3, aggregation="token", backend=backend)
    out.value_loss.backward()
    expected = torch.tensor([[0.1 - 2.0, 0.0, 1.0 + 2.0, 0.0]], device=DEVICE) / 4
    torch.testing.assert_close(values.grad, expected)
    assert float(out.stats.value_clip) == pytest.approx(0.5)
