"""Both PPO losses with gradients at 128 × 1024 (quick: 64 × 512), beside the eager formula and torch.compile.

Fewest bytes a token: six inputs and a mask byte read, two gradients written: 33.
"""

import rto_kernels as rk
import torch

from bench.harness import DEVICE, FULL, compare, gradients, source
from bench.kernels.peers import compiled, eager_ppo

BATCH, WIDTH = (128, 1024) if FULL else (64, 512)


def test_ppo_loss(once):
    random = source()
    logp, old_logp, advantages, values, old_values, returns = (
        (torch.randn(BATCH, WIDTH, **random) * 0.3) for _ in range(6)
    )
    lengths = torch.randint(1, WIDTH + 1, (BATCH, 1), **random)
    mask = torch.arange(WIDTH, device=DEVICE) < lengths
    ups = {"policy": torch.tensor(0.7, device=DEVICE), "value": torch.tensor(1.3, device=DEVICE)}

    def run(losses, dtype=torch.float32):
        free = {"logp": logp.to(dtype).requires_grad_(), "values": values.to(dtype).requires_grad_()}
        others = [x.to(dtype) for x in (old_logp, advantages, old_values, returns)]
        policy, value = losses(free["logp"], *others[:2], free["values"], *others[2:])
        return gradients({"policy": policy, "value": value}, {k: u.to(dtype) for k, u in ups.items()}, free)

    def ours():
        return run(lambda *x: rk.ppo_loss(*x, mask=mask)[:2])

    contenders = {"ours": ours, "eager": lambda: run(lambda *x: eager_ppo(*x, mask))}
    compiled_ppo = compiled(eager_ppo)
    if compiled_ppo is not None:
        contenders["torch.compile"] = lambda: run(lambda *x: compiled_ppo(*x, mask))
    record = compare(
        "ppo_loss", f"{BATCH} × {WIDTH}", contenders, tolerance=1e-4, moved=BATCH * WIDTH * 33,
        reference=lambda: run(lambda *x: eager_ppo(*x, mask), torch.float64), shape={"B": BATCH, "T": WIDTH},
    )  # fmt: skip
    once(ours, record)
