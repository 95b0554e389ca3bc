"""token_rewards and rewards_gae's first half against the paper's formula, a token at a time in fp64."""

import pytest
import rto_kernels as rk
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import BACKENDS, DEVICE, DTYPES, KINDS, bits, check_error, largest, layouts, sample
from rto_kernels import reference
from rto_kernels._dispatch import count_launches

COEFFICIENTS = {"beta1": 0.05, "beta2": 0.01, "beta3": 1.0, "dpo_clip": 0.05, "score_clip": 1.5}


def bounded(x: float, bound: float | None) -> float:
    return max(-bound, min(bound, x)) if bound else x


def truth(layout, policy, ref, dpo, base, scores, beta1, beta2, beta3, dpo_clip, score_clip):
    """{output: fp64}, from the formula in plain Python."""
    policy, ref, dpo, base = (x.double().reshape(-1).tolist() for x in (policy, ref, dpo, base))
    outs = {name: [0.0] * len(policy) for name in rk.TokenRewards._fields}
    for inside, score in zip(layout.inside, scores.double().tolist(), strict=True):
        for i in inside:
            outs["dpo_reward"][i] = bounded(beta1 * (dpo[i] - base[i]), dpo_clip)
            outs["kl"][i] = policy[i] - ref[i]
            outs["policy_logp"][i], outs["ref_logp"][i], outs["dpo_logp"][i] = policy[i], ref[i], dpo[i]
            outs["rewards"][i] = outs["dpo_reward"][i] - beta2 * outs["kl"][i]
        if inside:
            outs["rewards"][inside[-1]] += beta3 * bounded(score, score_clip)
    return {name: torch.tensor(x, dtype=torch.float64).reshape(layout.shape) for name, x in outs.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    layout=layouts(),
    dtype=st.sampled_from(DTYPES),
    separate_base=st.booleans(),
    beta1=st.sampled_from([0.05, 0.0, 2.0]),
    beta2=st.sampled_from([0.01, 0.0, 0.5]),
    beta3=st.sampled_from([1.0, 0.0]),
    dpo_clip=st.sampled_from([0.05, 0.0, None]),
    score_clip=st.sampled_from([0.7, 0.0, None, 10.0]),
)
def test_equals_the_formula(backend, layout, dtype, separate_base, **coefficients):
    policy, ref, dpo, other = (layout.tokens(dtype, scale=3) for _ in range(4))
    scores = layout.sequences(dtype, scale=2)
    base = other if separate_base else None
    kw = {**coefficients, **layout.kw, "dpo_ref_logp": base}
    with count_launches() as launches:
        out = rk.token_rewards(policy, ref, dpo, scores, backend=backend, **kw)
    expected = truth(layout, policy, ref, dpo, ref if base is None else base, scores, **coefficients)
    same = reference.token_rewards(policy, ref, dpo, scores, **kw)
    for name, got in out._asdict().items():
        assert got.dtype == torch.float32
        assert not got.requires_grad
        check_error(name, got, expected[name], getattr(same, name), largest(policy, ref, dpo, other, scores))
    assert layout.outside_is_zero(*out)
    assert launches == ({"token_rewards": 1} if backend == "triton" and layout.batch else {})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_every_time_and_alone(backend, kind):
    layout = sample(kind)
    inputs = [layout.tokens() for _ in range(3)]
    scores = layout.sequences()
    first, second = (rk.token_rewards(*inputs, scores, **COEFFICIENTS, **layout.kw, backend=backend) for _ in range(2))
    assert bits(*first) == bits(*second)
    for row, positions in enumerate(layout.rows):  # a sequence by itself has the bits it had among others
        at = torch.tensor(positions, dtype=torch.long, device=DEVICE)
        alone = [x.reshape(-1)[at][None] for x in inputs]
        mask = None if layout.mask is None else layout.mask.reshape(-1)[at][None]
        one = rk.token_rewards(*alone, scores[row : row + 1], **COEFFICIENTS, mask=mask, backend=backend)
        assert bits(*one) == bits(*(x.reshape(-1)[at] for x in first))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_over_a_response(backend):
    """Unclipped, the rewards of a response sum to beta1·lr_dpo − beta2·lr + beta3·score."""
    layout = sample("packed")
    policy, ref, dpo, scores = *(layout.tokens() for _ in range(3)), layout.sequences()
    out = rk.token_rewards(
        policy,
        ref,
        dpo,
        scores,
        beta1=0.3,
        beta2=0.2,
        beta3=0.5,
        cu_seqlens=layout.cu_seqlens,
        backend=backend,
    )
    for row, positions in enumerate(layout.rows):
        total = 0.3 * (dpo - ref)[positions].sum() - 0.2 * (policy - ref)[positions].sum()
        total = total + 0.5 * scores[row] if positions else total
        torch.testing.assert_close(out.rewards[positions].sum(), total)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_coefficient_is_exactly_off(backend):
    """PPO is beta1 = 0, also where the DPO model gives a token no probability at all."""
    layout = sample("packed")
    policy, ref, scores = layout.tokens(), layout.tokens(), layout.sequences()
    dead = torch.full_like(policy, float("-inf"))
    kw = {"beta2": 0.1, "cu_seqlens": layout.cu_seqlens, "backend": backend}
    out = rk.token_rewards(policy, ref, dead, scores, beta1=0.0, **kw)
    assert (out.dpo_reward == 0).all()
    assert bits(out.rewards) == bits(rk.token_rewards(policy, ref, ref, scores, beta1=0.7, **kw).rewards)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_numeric_masks(backend):
    layout = sample("gaps")
    inputs, scores = [layout.tokens() for _ in range(3)], layout.sequences()
    expected = rk.token_rewards(*inputs, scores, **COEFFICIENTS, mask=layout.mask, backend=backend)
    strided = [x.T.contiguous().T for x in inputs]
    for mask in (layout.mask.T.contiguous().T, layout.mask.float(), layout.mask.long()):
        got = rk.token_rewards(*strided, scores[:1].expand(5) * 0 + scores, **COEFFICIENTS, mask=mask, backend=backend)
        assert bits(*got) == bits(*expected)
    expanded = rk.token_rewards(*inputs, scores[:1].expand(5), **COEFFICIENTS, mask=layout.mask, backend=backend)
    assert (expanded.kl == expected.kl).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["packed", "gaps"])
def test_operator(backend, kind):
    layout = sample(kind)
    args = [layout.tokens().nan_to_num() for _ in range(4)]
    torch.library.opcheck(
        torch.ops.rto_kernels.token_rewards,
        (*args, layout.sequences(), layout.cu_seqlens, layout.mask, 0.1, 0.2, 1.0, 0.05, 10.0, backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend):
    layout = sample("packed")
    inputs, scores = [layout.tokens() for _ in range(3)], layout.sequences()

    def caller(policy, ref, dpo, scores, cu_seqlens):
        out = rk.token_rewards(policy * 2, ref, dpo, scores, **COEFFICIENTS, cu_seqlens=cu_seqlens, backend=backend)
        return out.rewards + out.kl

    compiled = torch.compile(caller, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, scores, layout.cu_seqlens), caller(*inputs, scores, layout.cu_seqlens))


def test_fp64_stays_fp64_on_the_pytorch_path():
    layout = sample("gaps")
    inputs, scores = [layout.tokens(torch.float64) for _ in range(3)], layout.sequences(torch.float64)
    out = rk.token_rewards(*inputs, scores, **COEFFICIENTS, mask=layout.mask, backend="torch")
    expected = truth(layout, *inputs, inputs[1], scores, **COEFFICIENTS)
    for name, got in out._asdict().items():
        assert got.dtype == torch.float64
        torch.testing.assert_close(got.cpu(), expected[name], rtol=1e-12, atol=1e-12)
