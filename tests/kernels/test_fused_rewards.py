"""Token rewards from logits and hidden states against the same in fp64, and against the parts they fuse."""

import pytest
import rto_kernels as rk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import BACKENDS, DEVICE, DTYPES, KINDS, bits, check_error, layouts, sample
from rto_kernels import fused_rewards as module
from rto_kernels import reference
from rto_kernels._dispatch import INTERPRET, count_launches

COEFFICIENTS = {"beta1": 0.05, "beta2": 0.01, "beta3": 1.0, "dpo_clip": 0.02, "score_clip": 1.5}


def of_models(layout, count, size, dtype):
    """`count` tensors [*tokens, size], NaN outside the mask."""
    out = []
    for _ in range(count):
        x = torch.randn(*layout.shape, size, generator=layout.generator).to(dtype).to(DEVICE)
        out.append(x if layout.mask is None else x.masked_fill((layout.mask == 0)[..., None], torch.nan))
    return out


def targets_of(layout, vocab):
    """Random ids; nonsense outside the mask."""
    ids = torch.randint(0, vocab, layout.shape, generator=layout.generator).to(DEVICE)
    return ids if layout.mask is None else ids.masked_fill(layout.mask == 0, 10**6)


def clean(layout, x):
    return x if layout.mask is None else x.nan_to_num(0)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=8 if INTERPRET else 60)
@given(
    layout=layouts(),
    vocab=st.sampled_from([1, 7, 64, 65, 100]),
    dtype=st.sampled_from(DTYPES),
    fourth=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7]),
    beta1=st.sampled_from([0.05, 0.0]),
    beta2=st.sampled_from([0.01, 0.0]),
    dpo_clip=st.sampled_from([0.02, None]),
)
def test_from_logits_equals_fp64_truth(backend, layout, vocab, dtype, fourth, temperature, **coefficients):
    logits = of_models(layout, 3 + fourth, vocab, dtype)
    targets, scores = targets_of(layout, vocab), layout.sequences(scale=2)
    kw = {**COEFFICIENTS, **coefficients, **layout.kw, "temperature": temperature}
    extra = {"dpo_ref_logits": logits[3]} if fourth else {}
    with count_launches() as launches:
        out = rk.logits_token_rewards(*logits[:3], targets, scores, backend=backend, **extra, **kw)
    inside = targets if layout.mask is None else torch.where(layout.mask != 0, targets, -100)
    results = []
    for convert in (torch.Tensor.double, lambda x: x):
        models = [convert(clean(layout, x)) for x in logits]
        extra = {"dpo_ref_logits": models[3]} if fourth else {}
        results.append(reference.logits_token_rewards(*models[:3], inside, convert(scores), **extra, **kw))
    for name, got in out._asdict().items():
        assert got.dtype == torch.float32
        check_error(name, got, *(getattr(r, name) for r in results), scale=6)
    assert layout.outside_is_zero(*out)
    assert launches == ({"logits_token_rewards": 1} if backend == "triton" and targets.numel() else {})


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=8 if INTERPRET else 60)
@given(
    layout=layouts(),
    dtype=st.sampled_from(DTYPES),
    fourth=st.booleans(),
    softcap=st.sampled_from([None, 5.0]),
)
def test_from_hidden_states_equals_fp64_truth(backend, layout, dtype, fourth, softcap):
    widths, vocab = (8, 5, 16, 8)[: 3 + fourth], 70
    hiddens = [of_models(layout, 1, width, dtype)[0] for width in widths]
    weights = [
        torch.randn(vocab, width, generator=layout.generator).to(dtype).to(DEVICE) / width**0.5 for width in widths
    ]
    biases = [torch.randn(vocab, generator=layout.generator).to(dtype).to(DEVICE), None, None, None][: 3 + fourth]
    targets, scores = targets_of(layout, vocab), layout.sequences(scale=2)
    kw = {**COEFFICIENTS, **layout.kw, "temperature": 0.8, "softcap": softcap}
    out = rk.fused_token_rewards(hiddens, weights, targets, scores, biases=biases, backend=backend, **kw)
    inside = targets if layout.mask is None else torch.where(layout.mask != 0, targets, -100)
    results = []
    for convert in (torch.Tensor.double, lambda x: x):
        args = [
            [convert(clean(layout, x)) for x in hiddens],
            [convert(x) for x in weights],
            inside,
            convert(scores),
        ]
        of = [None if x is None else convert(x) for x in biases]
        results.append(reference.fused_token_rewards(*args, biases=of, **kw))
    for name, got in out._asdict().items():
        check_error(name, got, *(getattr(r, name) for r in results), scale=6)
        assert not got.requires_grad
    assert layout.outside_is_zero(*out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_every_time_and_as_its_parts(backend, kind):
    layout = sample(kind)
    logits = of_models(layout, 3, 20, torch.bfloat16)
    targets, scores = targets_of(layout, 20), layout.sequences()
    kw = {**COEFFICIENTS, **layout.kw, "backend": backend}
    first, second = (rk.logits_token_rewards(*logits, targets, scores, **kw) for _ in range(2))
    assert bits(*first) == bits(*second)
    inside = targets if layout.mask is None else torch.where(layout.mask != 0, targets, -100)
    logps = [rk.logprobs_from_logits(x, inside, backend=backend) for x in logits]
    assert bits(*rk.token_rewards(*logps, scores, **kw)) == bits(*first)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_batch_determinism(backend):
    layout = sample("packed")
    hiddens = [of_models(layout, 1, 13, torch.float32)[0] for _ in range(3)]
    weights = [torch.randn(7, 13, generator=layout.generator).to(DEVICE) for _ in range(3)]
    targets, scores = targets_of(layout, 7), layout.sequences()
    kw = {**COEFFICIENTS, "deterministic": "batch", "backend": backend}
    whole = rk.fused_token_rewards(hiddens, weights, targets, scores, cu_seqlens=layout.cu_seqlens, **kw)
    for row, positions in enumerate(layout.rows):
        at = torch.tensor(positions, dtype=torch.long, device=DEVICE)
        alone = rk.fused_token_rewards(
            [h[at][None] for h in hiddens], weights, targets[at][None], scores[row : row + 1], **kw
        )
        assert bits(*alone) == bits(*(x[at] for x in whole))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_targets_inside_the_mask(backend):
    layout = sample("packed")
    logits, scores = of_models(layout, 3, 20, torch.float32), layout.sequences()
    targets = targets_of(layout, 20)
    targets[::3] = -100
    kw = {**COEFFICIENTS, **layout.kw}
    out = rk.logits_token_rewards(*logits, targets, scores, backend=backend, **kw)
    truth = reference.logits_token_rewards(*(x.double() for x in logits), targets, scores.double(), **kw)
    for a, b in zip(out, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_one_graph(backend):
    layout = sample("packed_masked")
    logits = [x.nan_to_num(0) for x in of_models(layout, 3, 20, torch.float32)]
    targets, scores = targets_of(layout, 20), layout.sequences()
    torch.library.opcheck(
        module._logits_token_rewards,
        (
            logits,
            targets,
            scores,
            layout.cu_seqlens,
            layout.mask,
            0.9,
            -100,
            0.05,
            0.01,
            1.0,
            0.0,
            0.0,
            backend,
        ),
    )
    kw = {**COEFFICIENTS, **layout.kw, "backend": backend}

    def f(x):
        return rk.logits_token_rewards(x * 2, *logits[1:], targets, scores, **kw).rewards + 1

    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(logits[0]), f(logits[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_is_named(backend):
    logits, targets, scores = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2)
    logits, targets, scores = (x.to(DEVICE) for x in (logits, targets, scores))
    kw = {"beta1": 0.1, "beta2": 0.1, "backend": backend}
    with pytest.raises(ValueError, match="ref_logits must have shape"):
        rk.logits_token_rewards(logits, logits[..., :4], logits, targets, scores, **kw)
    with pytest.raises(ValueError, match="scores must have shape"):
        rk.logits_token_rewards(logits, logits, logits, targets, scores[:1], **kw)
    with pytest.raises(ValueError, match="targets must have shape"):
        rk.logits_token_rewards(logits, logits, logits, targets[0], scores, **kw)
    with pytest.raises(ValueError, match="temperature"):
        rk.logits_token_rewards(logits, logits, logits, targets, scores, temperature=0.0, **kw)
    weight = torch.zeros(5, 5, device=DEVICE)
    with pytest.raises(ValueError, match="hiddens must be of policy, reference and DPO model"):
        rk.fused_token_rewards([logits] * 2, [weight] * 2, targets, scores, **kw)
    with pytest.raises(ValueError, match="weights must be 3"):
        rk.fused_token_rewards([logits] * 3, [weight] * 2, targets, scores, **kw)
    with pytest.raises(ValueError, match=r"hiddens\[1\] must have shape"):
        rk.fused_token_rewards([logits, logits[:1], logits], [weight] * 3, targets, scores, **kw)
