"""Objectives on preference pairs, one function each; every tensor [P], one entry a pair, fp32.

Log-probs are sums over a response's tokens (nats). Each function returns the per-pair loss, which the caller
divides by the train batch's global number of pairs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected) of a reward model's scores (Ouyang et al. 2022, Eq. 1)."""
    return -F.logsigmoid(chosen - rejected)


def dpo_loss(
    chosen_logp: Tensor, rejected_logp: Tensor, ref_chosen_logp: Tensor, ref_rejected_logp: Tensor, *, beta: float
) -> Tensor:
    """-log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected)) (Rafailov et al. 2023, Eq. 7)."""
    margin = (chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp)
    return -F.logsigmoid(beta * margin)
