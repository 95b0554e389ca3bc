"""Where the learnt token rewards are paid: one function a variant.

All work on the DPO rewards that are already clipped token by token, so that moved or subtracted sums are sums of
what RTO itself pays; KL penalty and terminal score stay where they are.

    dpo        [R] fp32, clip(beta1 * log(pi_dpo / pi_ref)) of each response token
    cu         [B + 1] int64 boundaries of the responses
    delimiter  [R] bool, whether the token ends a sentence
    ->         [R] fp32, the dense part of the token rewards
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def token_credit(dpo: Tensor, cu: Tensor, delimiter: Tensor) -> Tensor:
    """RTO: each token is paid its own reward (arXiv 2404.18922, Eq. 4.7)."""
    return dpo


def sentence_credit(dpo: Tensor, cu: Tensor, delimiter: Tensor) -> Tensor:
    """Semi-RTO: each sentence's rewards are paid at its delimiter, the rest's at the last token."""
    return _pay_at(dpo, delimiter | _lasts(dpo, cu))


def response_credit(dpo: Tensor, cu: Tensor, delimiter: Tensor) -> Tensor:
    """DDPO: all of a response's rewards are paid at its last token."""
    return _pay_at(dpo, _lasts(dpo, cu))


def shaped_credit(dpo: Tensor, cu: Tensor, delimiter: Tensor) -> Tensor:
    """RS-PPO: RTO's rewards less their sum at the last token, so that a response's total is PPO's."""
    out = dpo.clone()
    some = cu.diff() > 0
    out[cu[1:][some] - 1] -= torch.segment_reduce(dpo, "sum", lengths=cu.diff())[some]
    return out


Credit = Callable[[Tensor, Tensor, Tensor], Tensor]

CREDIT: dict[str, Credit] = {
    "token": token_credit,
    "sentence": sentence_credit,
    "response": response_credit,
    "shaped": shaped_credit,
}


def _lasts(dpo: Tensor, cu: Tensor) -> Tensor:
    """[R] bool: the last token of each response."""
    out = torch.zeros(dpo.shape, dtype=torch.bool, device=dpo.device)
    out[cu[1:][cu.diff() > 0] - 1] = True
    return out


def _pay_at(dpo: Tensor, ends: Tensor) -> Tensor:
    """Sums over the stretches that end at `ends` ([R] bool, every response's last token among them), paid there."""
    places = ends.nonzero()[:, 0]
    lengths = places.diff(prepend=places.new_full((1,), -1))
    out = torch.zeros_like(dpo)
    out[places] = torch.segment_reduce(dpo, "sum", lengths=lengths)
    return out
