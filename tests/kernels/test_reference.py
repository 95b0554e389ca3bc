"""The readable twins against the public functions: same names, arguments that agree, results that agree."""

import inspect

import pytest
import rto_kernels as rk
import torch
from kernel_checks import DEVICE, INTERPRET, sample
from rto_kernels import reference

FUNCTIONS = [name for name in rk.__all__ if name[0].islower() and name != "warm"]  # which computes nothing
# How a result is computed, not what it is.
ONLY_PUBLIC = {
    "backend",
    "save_probs",
    "save_share",
    "process_group",
    "vocab_start",
    "gather",
    "inplace_backward",
    "group",
    "deterministic",
}
plain_run = pytest.mark.skipif(INTERPRET, reason="the twins do not depend on the backend; runs without it")


@plain_run
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_has_a_twin(name):
    public = inspect.signature(getattr(rk, name)).parameters
    twin = inspect.signature(getattr(reference, name)).parameters
    named = {k for k, p in twin.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    assert named <= set(public)
    if len(named) == len(twin):  # no **kwargs that pass the rest on
        assert set(public) - ONLY_PUBLIC == named
    for key in named:
        assert twin[key].default == public[key].default, key


@plain_run
@pytest.mark.parametrize("kind", ["packed", "gaps"])
def test_token_sized_twins_agree(kind):
    layout = sample(kind)
    logps, values = [layout.tokens() for _ in range(3)], layout.tokens()
    scores = layout.sequences()
    kw = {"beta1": 0.2, "beta2": 0.1, "dpo_clip": 0.1, "gaps": "carry", **layout.kw}
    ours = rk.rewards_gae(*logps, scores, values, **kw, backend="torch")
    twin = reference.rewards_gae(*logps, scores, values, **kw)
    torch.testing.assert_close(tuple(ours[0]), tuple(twin[0]))
    torch.testing.assert_close(tuple(ours[1]), tuple(twin[1]), rtol=1e-5, atol=1e-5)


@plain_run
def test_vocabulary_sized_twins_agree():
    layout = sample("packed")
    n, hidden, vocab = layout.shape[0], 12, 29
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    h, w, bias = random(n, hidden).requires_grad_(), random(vocab, hidden).requires_grad_(), random(vocab)
    targets = torch.randint(vocab, (n,), generator=generator).to(DEVICE)
    targets[3] = -100
    kw = {"bias": bias, "temperature": 0.7, "softcap": 3.0}
    on = {"backend": "torch"}  # fp64 is its alone
    ours = rk.token_logprobs(h, w, targets, return_entropy=True, **kw, **on)
    twin = reference.token_logprobs(h, w, targets, return_entropy=True, **kw)
    torch.testing.assert_close(ours, twin)
    extras = ("is_top1", "log_sum_sq_probs", "mean_logits")
    torch.testing.assert_close(
        rk.token_logprobs(h, w, targets, extras=extras, **kw, **on),
        reference.token_logprobs(h, w, targets, extras=extras, **kw),
    )
    up = random(2, n)
    for a, b in zip(
        torch.autograd.grad((torch.stack(ours) * up).sum(), (h, w)),
        torch.autograd.grad((torch.stack(twin) * up).sum(), (h, w)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    logits = random(n, vocab)
    torch.testing.assert_close(
        rk.logprobs_from_logits(logits, targets, temperature=1.3, return_entropy=True, **on),
        reference.logprobs_from_logits(logits, targets, temperature=1.3, return_entropy=True),
    )
    old_logp, advantages = twin[0].detach() + 0.2 * random(n), random(n)
    loss_kw = {**kw, "entropy_coef": 0.1, "clip": (0.1, 0.3), "cu_seqlens": layout.cu_seqlens}
    a = rk.fused_linear_ppo_loss(h, w, targets, old_logp, advantages, **loss_kw, **on)
    b = reference.fused_linear_ppo_loss(h, w, targets, old_logp, advantages, **loss_kw)
    torch.testing.assert_close(a.policy_loss, b.policy_loss)
    torch.testing.assert_close(tuple(a.stats), tuple(b.stats))
    torch.testing.assert_close(torch.autograd.grad(a.policy_loss, (h, w)), torch.autograd.grad(b.policy_loss, (h, w)))


@plain_run
def test_fused_reward_twins_agree():
    layout = sample("packed")
    n, hidden, vocab = layout.shape[0], 8, 23
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(n, vocab, generator=generator).to(DEVICE) for _ in range(3)]
    targets = torch.randint(vocab, (n,), generator=generator).to(DEVICE)
    scores = layout.sequences()
    kw = {"beta1": 0.2, "beta2": 0.1, "temperature": 0.8, "cu_seqlens": layout.cu_seqlens}
    torch.testing.assert_close(
        tuple(rk.logits_token_rewards(*logits, targets, scores, **kw)),
        tuple(reference.logits_token_rewards(*logits, targets, scores, **kw)),
    )
    hiddens = [torch.randn(n, hidden, generator=generator).to(DEVICE) for _ in range(3)]
    weights = [torch.randn(vocab, hidden, generator=generator).to(DEVICE) for _ in range(3)]
    torch.testing.assert_close(
        tuple(rk.fused_token_rewards(hiddens, weights, targets, scores, **kw)),
        tuple(reference.fused_token_rewards(hiddens, weights, targets, scores, **kw)),
    )
