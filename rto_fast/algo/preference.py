"""Objectives on preferences, one function each.

Every tensor is fp32, one entry a pair ([P]) unless stated.

Log-probs are sums over a response's tokens (nats), lengths count its tokens, and the log-ratio of a response is
log(pi / pi_ref). Each function returns the loss of every row, which the caller divides by the train batch's
global number of rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin) of a reward model's scores.

    Without a margin it is Ouyang et al. 2022, Eq. 1; with one, Touvron et al. 2023 (Llama 2), Eq. 2.
    """
    return -F.logsigmoid(chosen - rejected if margin is None else chosen - rejected - margin)


def q_rm_loss(chosen_mean: Tensor, rejected_mean: Tensor, *, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta * (mean Z_chosen - mean Z_rejected) - gamma), Z a head's number at each response token.

    Q-RM's objective (arXiv 2505.23363; the mean-score strategy of github.com/homzer/Q-RM): Z stands for the token's Q.
    """
    return -F.logsigmoid(beta * (chosen_mean - rejected_mean) - gamma)


def dpo_loss(
    chosen_logp: Tensor, rejected_logp: Tensor, ref_chosen_logp: Tensor, ref_rejected_logp: Tensor, *, beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """-log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected)) (Rafailov et al. 2023, Eq. 7).

    label_smoothing: probability that a label is wrong, the weight of the loss with the two exchanged (cDPO); 0 = off.
    """
    margin = beta * ((chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp))
    loss = -F.logsigmoid(margin)
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin) if label_smoothing else loss


def outcome_loss(ratio: Tensor, outcome: Tensor, *, beta: float) -> Tensor:
    """Cross-entropy of sigmoid(beta * ratio) against a response's outcome (the implicit reward model of PRIME,
    arXiv 2502.01456), [E] one entry a response.

    ratio: [E] log-ratios; outcome: [E] in [0, 1], a verifier's verdict or a probability.
    """
    return F.binary_cross_entropy_with_logits(beta * ratio, outcome, reduction="none")


def chosen_nll(chosen_logp: Tensor, chosen_lens: Tensor) -> Tensor:
    """Mean negative log-prob of a chosen token, a response (Pang et al. 2024, Eq. 1)."""
    return -chosen_logp / chosen_lens


def mpo_loss(chosen_logp: Tensor, rejected_logp: Tensor, kept: Tensor, *, beta: float, keep: float) -> Tensor:
    """-sigmoid(beta * (log pi(y_w) - log pi(y_l))) - keep * kept; no reference (Jiang et al. 2023, arXiv 2312.16430).

    kept: [P] mean log pi of a token over rows that stand for the reference's own, whose likelihood the policy is to
    keep: a KL to the reference from data in place of a model. Without a logarithm before the sigmoid the loss is
    minus the chance of the right preference, bounded on both sides, so that a pair that is settled pulls no more.
    """
    return -torch.sigmoid(beta * (chosen_logp - rejected_logp)) - keep * kept


def r_dpo_loss(
    chosen_ratio: Tensor, rejected_ratio: Tensor, chosen_lens: Tensor, rejected_lens: Tensor, *, beta: float,
    alpha: float,
) -> Tensor:  # fmt: skip
    """DPO with a length margin: a longer chosen answer gets less gradient (Park et al. 2024, Eq. 9).

    -log sigmoid(beta * (ratio_w - ratio_l) + alpha * (|y_w| - |y_l|)), of log-ratios; alpha in nats a token.
    """
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio) + alpha * (chosen_lens - rejected_lens))


def simpo_loss(
    chosen_logp: Tensor, rejected_logp: Tensor, chosen_lens: Tensor, rejected_lens: Tensor, *, beta: float,
    gamma: float,
) -> Tensor:  # fmt: skip
    """-log sigmoid(beta * (mean log-prob of chosen - of rejected) - gamma); no reference (Meng et al. 2024, Eq. 6)."""
    return -F.logsigmoid(beta * (chosen_logp / chosen_lens - rejected_logp / rejected_lens) - gamma)


def ipo_loss(
    chosen_ratio: Tensor, rejected_ratio: Tensor, chosen_lens: Tensor, rejected_lens: Tensor, *, beta: float
) -> Tensor:
    """(d - 1 / (2 beta))^2, d the difference of log-ratios *a token* (Azar et al. 2023, Eq. 17; lengths as in TRL)."""
    return (chosen_ratio / chosen_lens - rejected_ratio / rejected_lens - 1 / (2 * beta)).square()


def tdpo1_loss(
    chosen_ratio: Tensor, rejected_ratio: Tensor, chosen_kl: Tensor, rejected_kl: Tensor, *, beta: float
) -> Tensor:
    """DPO less the difference of sequential KLs, K = sum_t KL(pi_ref || pi) (Zeng et al. 2024, Eq. 15).

    -log sigmoid(beta * (ratio_w - ratio_l - (K_l - K_w))), of log-ratios.
    """
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio - (rejected_kl - chosen_kl)))


def tdpo2_loss(
    chosen_ratio: Tensor, rejected_ratio: Tensor, chosen_kl: Tensor, rejected_kl: Tensor, *, beta: float, alpha: float
) -> Tensor:
    """TDPO with weight alpha on the KLs and no gradient through the chosen one's (Zeng et al. 2024, Eq. 17).

    -log sigmoid(beta * (ratio_w - ratio_l) - alpha * beta * (K_l - sg(K_w))), of log-ratios.
    """
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio - alpha * (rejected_kl - chosen_kl.detach())))


def token_weighted_loss(chosen_sum: Tensor, rejected_sum: Tensor, *, beta: float) -> Tensor:
    """-log sigmoid(beta * (sum_t w_t ratio_w,t - sum_t w_t ratio_l,t)): DPO with a weight on each token's log-ratio."""
    return -F.logsigmoid(beta * (chosen_sum - rejected_sum))


def tgdpo_weights(guide: Tensor, sign: Tensor, *, beta: float, alpha: float) -> Tensor:
    """1 + alpha * beta * g on tokens of chosen, 1 - alpha * beta * g on those of rejected (arXiv 2506.14574).

    guide: [R] g = log(pi_guide / pi_ref) of each token, nats, pi_guide an earlier DPO model; sign: [R] 1 on tokens of
    chosen, -1 on rejected's. As in the paper's code g is scaled by beta and is not clipped.
    """
    return 1 + alpha * beta * sign * guide


def tis_weights(guide: Tensor, sign: Tensor, *, low: float, high: float) -> Tensor:
    """exp(mu * clamp(g, low, high)), mu = 1 on tokens of chosen and -1 on those of rejected (arXiv 2410.04350).

    guide: [R] g = log(pi_plus / pi_minus) of each token, nats, of two contrastive models; sign: [R] mu. The scale k is
    1. With them `token_weighted_loss` is TIS-DPO without its term of weighted sequential KLs.
    """
    return torch.exp(sign * guide.clamp(low, high))


def kto_loss(
    ratio: Tensor, desirable: Tensor, kl: Tensor, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """Kahneman-Tversky optimisation of single answers (Ethayarajh et al. 2024, Eq. 7), [E] one entry an example.

        w_D * (1 - sigmoid(beta * (ratio - kl)))   where desirable
        w_U * (1 - sigmoid(beta * (kl - ratio)))   where not

    ratio: [E] log-ratios; desirable: [E] bool; kl: [] the batch's `kto_baseline`, without gradient.
    """
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    sign = torch.where(desirable, 1.0, -1.0)
    return weight * torch.sigmoid(-beta * sign * (ratio - kl))


def kto_baseline(mismatched_ratio_sum: Tensor, count: float) -> Tensor:
    """max(0, mean log-ratio of other examples' completions under these prompts), [] (the KL estimate of KTO's Eq. 8).

    mismatched_ratio_sum: [] over the whole train batch, all ranks; count: its examples.
    """
    return (mismatched_ratio_sum / count).clamp(min=0).detach()


def mppo_loss(chosen_mean: Tensor, rejected_mean: Tensor, negatives: Tensor) -> Tensor:
    """-log sigmoid(N * p_w - sum of p_l over N negatives), p = exp(mean log-prob a token); no reference
    (Xie et al. 2024, pair-wise form).

    chosen_mean: [P] mean log-prob of a token; rejected_mean: [sum of negatives] the same of each row's negatives, one
    row after the other; negatives: [P] int64, N of each row.
    """
    rejected = torch.segment_reduce(rejected_mean.exp(), "sum", lengths=negatives)
    return -F.logsigmoid(negatives * chosen_mean.exp() - rejected)
