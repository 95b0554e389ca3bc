"""Sizes where an index leaves 32 bits: N·V above 2^31, V = 262,144, N = 65,537. They need a GPU and its memory."""

import pytest
import rto_kernels as rk
import torch
from kernel_checks import DEVICE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU"),
    pytest.mark.xdist_group("large"),  # on one worker, so that they take the GPU's memory in turn
]

TOKENS, VOCAB = 65537, 262144
BORDER = 2**31 // VOCAB  # the row where a 32-bit offset would turn negative
ROWS = [0, 1, BORDER - 1, BORDER, 2 * BORDER, TOKENS // 2, TOKENS - 1]


def needs(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of free GPU memory, there are {free:.0f}")


def close(got: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    assert got.isfinite().all()
    assert float((got.double() - truth).norm() / truth.norm()) <= tolerance


def test_logits_and_their_gradient_in_place():
    needs(38)
    random = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.empty(TOKENS, VOCAB, dtype=torch.bfloat16, device=DEVICE).normal_(generator=random).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), generator=random, device=DEVICE)
    up = torch.randn(TOKENS, generator=random, device=DEVICE)
    truth = torch.log_softmax(logits.detach()[ROWS].double(), 1)
    logp = rk.logprobs_from_logits(logits, targets, inplace_backward=True)
    close(logp[ROWS], truth[range(len(ROWS)), targets[ROWS]], 1e-5)
    (gradient,) = torch.autograd.grad(logp, logits, up)
    expected = -truth.exp()
    expected[range(len(ROWS)), targets[ROWS]] += 1
    close(gradient[ROWS], expected * up[ROWS, None], 4e-3)  # bf16's own rounding


def test_rewards_from_three_models_logits():
    tokens = BORDER + 8
    needs(15)
    random = torch.Generator(DEVICE).manual_seed(0)
    new = torch.empty(3, 1, tokens, VOCAB, dtype=torch.bfloat16, device=DEVICE)
    logits = new.normal_(generator=random)
    targets = torch.randint(VOCAB, (1, tokens), generator=random, device=DEVICE)
    score = torch.ones(1, device=DEVICE)
    out = rk.logits_token_rewards(*logits, targets, score, beta1=0.05, beta2=0.01)
    rows = [0, BORDER - 1, BORDER, tokens - 1]
    for got, x in zip((out.policy_logp, out.ref_logp, out.dpo_logp), logits, strict=True):
        truth = torch.log_softmax(x[0, rows].double(), 1)[range(len(rows)), targets[0, rows]]
        close(got[0, rows], truth, 1e-5)


@pytest.mark.parametrize("width", [64, 77], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("kept", [False, True], ids=["recomputed", "kept"])
def test_linear_logprob(width, kept):
    tokens = BORDER + 129 if kept else TOKENS
    needs(12)
    random = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(tokens, width, generator=random, device=DEVICE).bfloat16().requires_grad_()
    weight = (torch.randn(VOCAB, width, generator=random, device=DEVICE) * 2 / width**0.5).bfloat16().requires_grad_()
    targets = torch.randint(VOCAB, (tokens,), generator=random, device=DEVICE)
    up = torch.randn(tokens, generator=random, device=DEVICE)
    logp = rk.token_logprobs(hidden, weight, targets, save_probs=kept)
    d_hidden, d_weight = torch.autograd.grad(logp, (hidden, weight), up)

    columns = torch.tensor([0, 1, VOCAB // 2, VOCAB - 1], device=DEVICE)
    expected_weight = torch.zeros(len(columns), width, dtype=torch.float64, device=DEVICE)
    w = weight.detach().float()
    for rows in torch.arange(tokens, device=DEVICE).split(1024):
        h, t, g = hidden.detach()[rows].float(), targets[rows], up[rows].double()
        z = h @ w.T
        lse = z.logsumexp(1)
        close(logp[rows], (z.gather(1, t[:, None])[:, 0] - lse).double(), 1e-4)
        p = (z - lse[:, None]).exp_()
        picked = (t[:, None] == columns).double() - p[:, columns].double()
        expected_weight += (picked * g[:, None]).T @ h.double()
        if int(rows[0]) % (8 * 1024) == 0:
            expected = (w[t] - p @ w).double() * g[:, None]
            close(d_hidden[rows], expected, 1e-2)
    close(d_weight[columns], expected_weight, 1e-2)
