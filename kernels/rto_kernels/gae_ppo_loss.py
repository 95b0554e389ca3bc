"""One PPO update over a whole rollout in two launches: GAE with whitening moments, then losses with
gradients.

The moments go from the first kernel to the second as they are, [ranks, 3], and are merged inside it, so
whitening costs no launch of its own. Equations: gae.py and ppo_loss.py.
"""

import torch.distributed as dist
from torch import Tensor

from ._ppo_arguments import PPOOptions, Tokens, Whitening
from .gae import GAE, gae, gather_moments
from .ppo_loss import PPOLoss, run_ppo_loss


def gae_ppo_loss(
    logp: Tensor,
    old_logp: Tensor,
    rewards: Tensor,
    old_values: Tensor,
    values: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    gaps: str = "zero",
    bootstrap: Tensor | None = None,
    whiten: bool = True,
    group: dist.ProcessGroup | None = None,
    correction: int = 0,
    clip: float | tuple[float | None, float | None] | None = 0.2,
    value_clip: float | None = 0.2,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    sampler_logp: Tensor | None = None,
    is_cap: float | None = None,
    aggregation: str = "sequence",
    denominator: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[PPOLoss, GAE]:
    """GAE, whitening and both losses with gradients in two launches: one update over a whole rollout.

    rewards and old_values (the critic's at rollout time) give advantages and returns; values, the current
    critic's, the value loss (None: no value loss). whiten over these tokens, and over the group's ranks if a
    group is given (which adds one all_gather of three numbers). The rest, layouts and errors as in `gae` and
    `ppo_loss`.
    Returns (PPOLoss, GAE); the advantages in GAE are not whitened.
    """
    estimate = gae(
        rewards, old_values, gamma=gamma, lam=lam, cu_seqlens=cu_seqlens, mask=mask, gaps=gaps,
        bootstrap=bootstrap, backend=backend,
    )  # fmt: skip
    whitening = Whitening()
    if whiten:
        whitening = Whitening(moments=gather_moments(estimate.moments, group), correction=correction)
    tokens = Tokens(logp, old_logp, estimate.advantages, values, old_values, estimate.returns, entropy, sampler_logp)
    options = PPOOptions(clip, value_clip, is_cap, entropy_coef, aggregation)
    return run_ppo_loss(tokens, whitening, options, denominator, cu_seqlens, mask, backend), estimate
