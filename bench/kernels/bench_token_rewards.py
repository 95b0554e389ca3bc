"""Token rewards, GAE and their moments at 128 × 1024 (quick: 64 × 512), beside the loop over time.

Fewest bytes a token, rewards and GAE in one launch: four log-probs or values and a mask byte read, eight
results written (25 bytes for GAE's own share; the token rewards come with their log-probs, for PPO).
"""

import rto_kernels as rk
import torch

from bench.harness import DEVICE, FULL, compare, source
from bench.kernels.peers import loop_gae

BATCH, WIDTH = (128, 1024) if FULL else (64, 512)
BETAS = {"beta1": 0.05, "beta2": 0.01, "dpo_clip": 0.05}


def inputs():
    random = source()
    tokens = [torch.randn(BATCH, WIDTH, **random) for _ in range(4)]
    scores = torch.randn(BATCH, **random)
    lengths = torch.randint(1, WIDTH + 1, (BATCH, 1), **random)
    return tokens, scores, torch.arange(WIDTH, device=DEVICE) < lengths


def eager_rewards(policy, ref, dpo, scores, mask):
    reward = (0.05 * (dpo - ref)).clamp(-0.05, 0.05) - 0.01 * (policy - ref)
    last = mask.shape[1] - 1 - mask.long().fliplr().argmax(1, keepdim=True)
    return (reward * mask).scatter_add(1, last, scores.clamp(-10, 10)[:, None])


def moments(advantages, mask):
    inside = advantages[mask].double()
    return torch.stack([inside.new_tensor(inside.numel()), inside.mean(), (inside - inside.mean()).square().sum()])


def test_gae(once):
    (rewards, values, *_), _, mask = inputs()

    def ours():
        return dict(zip(("advantages", "returns", "moments"), rk.gae(rewards, values, mask=mask), strict=True))

    def loop(dtype=torch.float32):
        advantages, returns = loop_gae(rewards.to(dtype), values.to(dtype), mask, 1.0, 0.95)
        return {"advantages": advantages, "returns": returns, "moments": moments(advantages, mask)}

    record = compare(
        "gae", f"{BATCH} × {WIDTH}", {"ours": ours, "loop over time": loop},
        reference=lambda: loop(torch.float64), tolerance=1e-5, moved=BATCH * WIDTH * 17,
        shape={"B": BATCH, "T": WIDTH},
    )  # fmt: skip
    once(ours, record)


def test_rewards_gae(once):
    (policy, ref, dpo, values), scores, mask = inputs()

    def ours():
        tokens, estimate = rk.rewards_gae(policy, ref, dpo, scores, values, **BETAS, mask=mask)
        return {"rewards": tokens.rewards, "advantages": estimate.advantages, "moments": estimate.moments}

    def apart():
        tokens = rk.token_rewards(policy, ref, dpo, scores, **BETAS, mask=mask)
        estimate = rk.gae(tokens.rewards, values, mask=mask)
        return {"rewards": tokens.rewards, "advantages": estimate.advantages, "moments": estimate.moments}

    def loop(dtype=torch.float32):
        rewards = eager_rewards(*(x.to(dtype) for x in (policy, ref, dpo, scores)), mask)
        advantages, _ = loop_gae(rewards, values.to(dtype), mask, 1.0, 0.95)
        return {"rewards": rewards, "advantages": advantages, "moments": moments(advantages, mask)}

    record = compare(
        "rewards_gae", f"{BATCH} × {WIDTH}",
        {"ours": ours, "ours, two launches": apart, "loop over time": loop},
        reference=lambda: loop(torch.float64), tolerance=1e-5, moved=BATCH * WIDTH * 49,
        shape={"B": BATCH, "T": WIDTH},
    )  # fmt: skip
    once(ours, record)
