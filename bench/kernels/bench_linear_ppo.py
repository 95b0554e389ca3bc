"""The policy loss from hidden states with its gradients, beside logits → log-probs → loss, and peers'.

Three matrix products, 6·N·H·V operations: ours computes no logits twice. Memory is counted above the inputs
and the weight's gradient. `clipped`: a third of the rows have a ratio beyond the bounds and no gradient.
"""

import pytest
import rto_kernels as rk
import torch

from bench.harness import DEVICE, FULL, ON_GPU, ROUNDS, compare, gradients, source
from bench.kernels.peers import (
    chunked_products,
    compiled,
    eager_logp,
    liger_ppo,
    log_softmax_logp,
    openrlhf_logp,
    trl_chunked,
    verl_logp,
)

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 2e-2 if ON_GPU else 1e-4
BATCH = 8
CLIP = 0.2
if ON_GPU:
    SHAPES = [(4096, 4096, 128256)]
elif FULL:
    SHAPES = [(1024, 512, 64000), (4096, 1024, 128256)]
else:
    SHAPES = [(256, 128, 8192)]


def policy_loss(logp, old_logp, advantages):
    """Token mean of the clipped objective; all sequences have the same length here."""
    ratio = (logp - old_logp).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()


@pytest.mark.parametrize("moved", ["on-policy", "clipped"])
@pytest.mark.parametrize(("tokens", "hidden", "vocab"), SHAPES)
def test_fused_linear_ppo_loss(once, tokens, hidden, vocab, moved):
    random = source()
    h = torch.randn(BATCH, tokens // BATCH, hidden, **random).to(DTYPE).requires_grad_()
    w = (torch.randn(vocab, hidden, **random) * 2 / hidden**0.5).to(DTYPE).requires_grad_()
    targets = torch.randint(vocab, h.shape[:2], **random)
    # An advantage a sequence, which is what Liger's loss takes.
    by_sequence = torch.randn(BATCH, **random)
    advantages = by_sequence[:, None].expand(h.shape[:2]).contiguous()
    with torch.no_grad():
        logp = rk.token_logprobs(h.reshape(-1, hidden), w, targets.reshape(-1)).reshape(targets.shape)
        shift = torch.randn(targets.shape, **random) * (0.5 if moved == "clipped" else 0.05)
        old_logp = logp + shift
    up = torch.tensor(1.7, device=DEVICE)

    def run(loss):
        return gradients({"loss": loss()}, {"loss": up}, {"hidden": h, "weight": w})

    def ours():
        return run(
            lambda: (
                rk.fused_linear_ppo_loss(
                    h, w, targets, old_logp, advantages, clip=CLIP, aggregation="token"
                ).policy_loss
            )
        )

    def through(logp):
        return lambda: run(lambda: policy_loss(logp(h @ w.T, targets).float(), old_logp, advantages))

    def truth():
        return policy_loss(log_softmax_logp(h.float() @ w.float().T, targets), old_logp, advantages)

    contenders = {
        "ours": ours,
        "log_softmax": through(log_softmax_logp),
        "eager": through(eager_logp),
        "OpenRLHF's formula": through(openrlhf_logp),
    }
    heads = {
        "products, fused epilogue": chunked_products(tokens),
        "chunked products": chunked_products(max(1, tokens // 4)),
        "TRL fused head": trl_chunked(),
        "verl": verl_logp(),
    }
    for name, head in heads.items():
        if head is not None:
            contenders[name] = lambda head=head: run(
                lambda: policy_loss(
                    head(h.reshape(-1, hidden), w, targets.reshape(-1)).reshape(targets.shape), old_logp, advantages
                )
            )
    liger = liger_ppo()
    if liger is not None:
        contenders["Liger chunked loss"] = lambda: run(lambda: liger(h, w, targets, old_logp, by_sequence, CLIP))
    whole = compiled(lambda h, w: policy_loss(eager_logp(h @ w.T, targets), old_logp, advantages))
    if whole is not None:
        contenders["torch.compile"] = lambda: run(lambda: whole(h, w))
    record = compare(
        "fused_linear_ppo_loss", f"N {tokens}, H {hidden}, V {vocab}, {moved}", contenders,
        # A clipped loss is a small difference of large terms, and in bf16 off by more than its gradients.
        reference=lambda: run(truth), tolerance=TOLERANCE * (5 if moved == "clipped" else 1),
        flops=6 * tokens * hidden * vocab, held=(w.numel() + h.numel()) * w.element_size(),
        rounds=min(ROUNDS, 15 if ON_GPU else 3) if vocab > 100_000 else ROUNDS,
        shape={"N": tokens, "H": hidden, "V": vocab, "dtype": str(DTYPE)},
    )  # fmt: skip
    once(ours, record)
