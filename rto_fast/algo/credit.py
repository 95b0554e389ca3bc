"""Where the learnt token rewards are paid: one function a variant.

All work on the DPO rewards that are already clipped token by token, so that moved or subtracted sums are sums of
what RTO itself pays; KL penalty and terminal score stay where they are.

    dpo        [R] fp32, clip(beta1 * log(pi_dpo / pi_ref)) of each response token
    cu         [B + 1] int64 boundaries of the responses
    delimiter  [R] bool, whether the token ends a sentence (of segment_credit: a segment)
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


def segment_credit(dpo: Tensor, cu: Tensor, delimiter: Tensor) -> Tensor:
    """Each token is paid its segment's mean reward: the segment's sum divided by its length (arXiv 2501.02790)."""
    sums, lengths, _ = _stretches(dpo, delimiter | _lasts(dpo, cu))
    return torch.repeat_interleave(sums / lengths, lengths, output_size=dpo.numel())


def segment_ends(entropy: Tensor, cut: float) -> Tensor:
    """[R] bool: whether a segment ends at the token, since the next one is drawn at an entropy above the cut.

    entropy: [R] of the distribution that each token was drawn from, nats; cut: nats. The paper takes the entropies of
    the model before RL. Where a response ends is not told here.
    """
    out = torch.zeros_like(entropy, dtype=torch.bool)
    out[:-1] = entropy[1:] > cut
    return out


Credit = Callable[[Tensor, Tensor, Tensor], Tensor]

CREDIT: dict[str, Credit] = {
    "token": token_credit,
    "sentence": sentence_credit,
    "segment": segment_credit,
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
    out = torch.zeros_like(dpo)
    sums, _, places = _stretches(dpo, ends)
    out[places] = sums
    return out


def _stretches(dpo: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, lengths and last tokens of the stretches that end at `ends`; none where there is no token."""
    places = ends.nonzero()[:, 0]
    lengths = places.diff(prepend=places.new_full((1,), -1))
    # segment_reduce itself refuses to reduce nothing.
    sums = torch.segment_reduce(dpo, "sum", lengths=lengths) if places.numel() else dpo
    return sums, lengths, places
