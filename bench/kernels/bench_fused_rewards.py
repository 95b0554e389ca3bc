"""Token rewards from three models' logits or hidden states, beside three gathers and eager rewards.

Fewest work: each logit read once; from hidden states three matrix products, 2·N·H·V operations each. No
gradient.
"""

import rto_kernels as rk
import torch

from bench.harness import DEVICE, FULL, ON_GPU, compare, source
from bench.kernels.peers import eager_logp

BETAS = {"beta1": 0.05, "beta2": 0.01, "dpo_clip": 0.05}
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 2e-2 if ON_GPU else 1e-4
TOKENS, HIDDEN, VOCAB = ((8192, 4096, 128256) if ON_GPU else (1024, 512, 64000)) if FULL else (256, 128, 8192)
BATCH = 8


def common():
    random = source()
    targets = torch.randint(VOCAB, (BATCH, TOKENS // BATCH), **random)
    return random, targets, torch.randn(BATCH, **random)


def eager(logps, scores):
    policy, ref, dpo = logps
    rewards = (0.05 * (dpo - ref)).clamp(-0.05, 0.05) - 0.01 * (policy - ref)
    rewards[:, -1] += scores.clamp(-10, 10)
    return {"rewards": rewards, "policy_logp": policy}


@torch.no_grad()
def test_logits_token_rewards(once):
    random, targets, scores = common()
    logits = [(torch.randn(*targets.shape, VOCAB, **random) * 3).to(DTYPE) for _ in range(3)]

    def ours():
        out = rk.logits_token_rewards(*logits, targets, scores, **BETAS)
        return {"rewards": out.rewards, "policy_logp": out.policy_logp}

    record = compare(
        "logits_token_rewards", f"N {TOKENS}, V {VOCAB}",
        {"ours": ours, "three gathers": lambda: eager([eager_logp(x, targets) for x in logits], scores)},
        reference=lambda: eager([eager_logp(x.double(), targets) for x in logits], scores), tolerance=1e-4,
        moved=3 * TOKENS * VOCAB * logits[0].element_size(),
        shape={"N": TOKENS, "V": VOCAB, "dtype": str(DTYPE)},
    )  # fmt: skip
    once(ours, record)


@torch.no_grad()
def test_fused_token_rewards(once):
    random, targets, scores = common()
    hiddens = [torch.randn(*targets.shape, HIDDEN, **random).to(DTYPE) for _ in range(3)]
    weights = [(torch.randn(VOCAB, HIDDEN, **random) * 2 / HIDDEN**0.5).to(DTYPE) for _ in range(3)]
    cu_seqlens = torch.arange(0, TOKENS + 1, TOKENS // BATCH, device=DEVICE)
    flat = [h.reshape(-1, HIDDEN) for h in hiddens]

    def ours():
        out = rk.fused_token_rewards(flat, weights, targets.reshape(-1), scores, **BETAS, cu_seqlens=cu_seqlens)
        return {"rewards": out.rewards, "policy_logp": out.policy_logp}

    def through_logits():
        return eager([eager_logp(h @ w.T, targets) for h, w in zip(hiddens, weights, strict=True)], scores)

    def truth():
        wide = zip(hiddens, weights, strict=True)
        return eager([eager_logp(h.float() @ w.float().T, targets) for h, w in wide], scores)

    record = compare(
        "fused_token_rewards", f"N {TOKENS}, H {HIDDEN}, V {VOCAB}",
        {"ours": ours, "three heads": through_logits, "one product": lambda: {"logits": flat[0] @ weights[0].T}},
        reference=truth, floors=("one product",), tolerance=TOLERANCE, flops=6 * TOKENS * HIDDEN * VOCAB,
        shape={"N": TOKENS, "H": HIDDEN, "V": VOCAB, "dtype": str(DTYPE)},
    )  # fmt: skip
    once(ours, record)
