"""The two token layouts every token-sized function takes, and how its PyTorch path walks them.

padded   tokens [B, T], optional mask [B, T] (bool, or numbers where nonzero means inside): any token may be out
packed   tokens [N], cu_seqlens [B + 1]: sequence b is tokens[cu_seqlens[b] : cu_seqlens[b + 1]], possibly empty;
         a mask [N] may leave tokens out here too
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import check_cu_seqlens, check_tensor


def check_layout(name: str, tokens: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> int:
    """Check `tokens` (called `name`) against cu_seqlens and mask; return the number of sequences B."""
    if cu_seqlens is None:
        check_tensor(name, tokens, shape=(None, None), expect="[B, T] (or [N] with cu_seqlens=)")
        rows = tokens.shape[0]
    else:
        check_tensor(name, tokens, shape=(None,), expect="[N], packed, when cu_seqlens is given")
        check_cu_seqlens(cu_seqlens, tokens.shape[0], tokens.device)
        rows = cu_seqlens.shape[0] - 1
    if mask is not None:
        check_tensor(
            "mask", mask, shape=tuple(tokens.shape), expect=f"{list(tokens.shape)} like {name}", device=tokens.device
        )
    return rows


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 where any input is fp64 (tests), else fp32, whatever the inputs' precision."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


class Rows(NamedTuple):
    """The tokens inside the mask, in order, without the others: all a PyTorch path has to look at.

    index   [n] their positions in the flattened input, or None where every position is inside
    row     [n] the sequence each belongs to
    counts  [B] how many each sequence has
    ends    [B] where each sequence ends among the n
    """

    index: Tensor | None
    row: Tensor
    counts: Tensor
    ends: Tensor

    @staticmethod
    def of(tokens: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> "Rows":
        device = tokens.device
        if cu_seqlens is None:
            rows, width = tokens.shape
            counts = torch.full((rows,), width, device=device)
        else:
            counts = cu_seqlens.diff().long()
            rows = counts.shape[0]
        row = torch.repeat_interleave(torch.arange(rows, device=device), counts)
        index = None
        if mask is not None:
            index = (mask.reshape(-1) != 0).nonzero().squeeze(1)
            row = row[index]
            counts = torch.bincount(row, minlength=rows)
        return Rows(index, row, counts, counts.cumsum(0))

    @property
    def lasts(self) -> tuple[Tensor, Tensor]:
        """(sequences that have a token, where among the n the last token of each is)."""
        some = (self.counts > 0).nonzero().squeeze(1)
        return some, self.ends[some] - 1

    def take(self, tokens: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The inside tokens of `tokens`, flat [n], in `dtype`."""
        if tokens is None:
            return None
        flat = tokens.reshape(-1)
        return (flat if self.index is None else flat[self.index]).to(dtype)

    def put(self, inside: Tensor, like: Tensor) -> Tensor:
        """The inverse of `take`: shaped as `like`, zeros outside the mask."""
        if self.index is None:
            return inside.reshape(like.shape)
        out = inside.new_zeros(like.numel())
        out[self.index] = inside
        return out.reshape(like.shape)
