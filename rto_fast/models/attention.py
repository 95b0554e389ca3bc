"""Attention over packed sequences: each token sees its own sequence alone.

Three ways, chosen by `resolve_attention`:
    flash_attention_2   flash-attn's varlen kernel, through transformers
    varlen              PyTorch's own varlen kernel (CUDA, 16-bit)
    sdpa                PyTorch's scaled_dot_product_attention, one call for each run of equally long sequences
The last two are one function, registered with transformers under the name `rto_packed`. Soft-caps and sinks, which
neither kernel knows, are computed by their formula there.

Without packing (`alone`) each sequence goes through the model by itself, with transformers' own attention.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from rto_fast.errors import ConfigError

PACKED = "rto_packed"
ALONE = "alone"
"""The kernel of a layout that is not packed."""

IGNORED = frozenset(
    ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "use_cache", "cache_position",
     "output_attentions", "output_hidden_states", "return_dict", "output_router_logits")
)  # fmt: skip
"""Keywords of transformers' attention functions that change nothing here: the layout says the same, or all of it."""


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]
"""(query, key, value [count, heads, length, d], mask [length, length] or None = causal, scale) -> like query."""


@dataclass(frozen=True)
class PackedLayout:
    """Where the sequences of a packed row lie."""

    cu_seqlens: Tensor
    """[B + 1] int32, on the device."""
    position_ids: Tensor
    """[1, N] int64: 0 .. length - 1 in each sequence."""
    max_len: int
    """Longest sequence, tokens."""
    runs: tuple[tuple[int, int], ...]
    """(count, length) of consecutive sequences of equal length, in packed order."""
    kernel: str
    """varlen or sdpa (the function behind `rto_packed`), or alone: each sequence goes through the model by itself."""

    @staticmethod
    def make(lens: Sequence[int], device: torch.device | str, kernel: str = "sdpa") -> PackedLayout:
        """Layout of sequences of `lens` tokens; sort by length for the fewest calls."""
        lens_t = torch.tensor(list(lens), dtype=torch.int32)
        cu = torch.cat([lens_t.new_zeros(1), lens_t.cumsum(0, dtype=torch.int32)])
        position_ids = torch.arange(int(cu[-1])) - torch.repeat_interleave(cu[:-1].long(), lens_t.long())
        return PackedLayout(
            cu_seqlens=cu.to(device),
            position_ids=position_ids[None].to(device),
            max_len=max(lens),
            runs=tuple((len(list(group)), length) for length, group in groupby(lens)),
            kernel=kernel,
        )

    @property
    def lens(self) -> list[int]:
        """Tokens of each sequence, in packed order."""
        return [length for count, length in self.runs for _ in range(count)]

    def model_kwargs(self) -> dict[str, object]:
        """Keyword arguments for a transformers backbone; each attention takes those it knows."""
        return {
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_len,
            "max_length_k": self.max_len,
            "packed_layout": self,
        }


def resolve_attention(choice: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(transformers attention name, kernel of PackedLayout) for a setting of RunConfig.attention.

    Raises ValueError where the choice cannot run on the device or is not installed.
    """
    half_on_gpu = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    flash = importlib.util.find_spec("flash_attn") is not None
    if choice == "auto":
        choice = ("flash_attention_2" if flash else "varlen") if half_on_gpu else "sdpa"
    if choice != "sdpa" and not half_on_gpu:
        raise ValueError(f"attention: {choice} needs a CUDA device and a 16-bit dtype, got {device.type} and {dtype}")
    if choice == "flash_attention_2":
        if not flash:
            raise ValueError("attention: flash_attention_2 asks for flash-attn, which is not installed")
        return "flash_attention_2", "sdpa"
    return PACKED, choice


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_layout: PackedLayout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sequence.

    query [1, heads, N, d]; key [1, kv_heads, N, d], value [1, kv_heads, N, e] -> [1, N, heads, e]. s_aux [heads]: the
    logit of a sink, a key without a value. Raises ConfigError on what it does not do: dropout, attention that is not
    causal, a mask, a call without a layout, any keyword that it does not know.
    """
    unknown = sorted(k for k, v in others.items() if k not in IGNORED and v is not None and v is not False)
    if unknown:
        raise ConfigError(f"its attention takes {', '.join(unknown)}, which packed attention does not know")
    if packed_layout is None or attention_mask is not None or query.shape[0] != 1:
        raise ConfigError("packed attention needs one packed row, its layout and no attention mask")
    if dropout or is_causal is False or (is_causal is None and getattr(module, "is_causal", True) is False):
        raise ConfigError("packed attention is causal and has no dropout")
    window = sliding_window if sliding_window and sliding_window < packed_layout.max_len else None
    if softcap or s_aux is not None:
        out = _by_run(
            query, key, value, packed_layout, partial(_formula, softcap=softcap, sinks=s_aux), scaling, window
        )
    elif packed_layout.kernel == "varlen":
        out = _varlen(query, key, value, packed_layout, scaling, window)
    else:
        out = _by_run(query, key, value, packed_layout, _sdpa, scaling, window)
    return out, None


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float | None, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    grouped = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped = {"enable_gqa": True}
        else:  # PyTorch 2.11 has no such argument
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return varlen_attn(
        q, k, v, layout.cu_seqlens, layout.cu_seqlens, layout.max_len, layout.max_len,
        scale=scale, window_size=(-1 if window is None else window - 1, 0), **grouped,
    )[None]  # fmt: skip


def _by_run(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, attend: Attend, scale: float | None, window: int | None
) -> Tensor:
    """One call of `attend` for each run of equally long sequences."""
    sizes = [count * length for count, length in layout.runs]
    outs = []
    parts = zip(*(x[0].split(sizes, dim=1) for x in (q, k, v)), layout.runs, strict=True)
    for q_run, k_run, v_run, (count, length) in parts:
        # [heads, count * length, d] -> [count, heads, length, d]: views, no copy
        batch = [x.unflatten(1, (count, length)).transpose(0, 1) for x in (q_run, k_run, v_run)]
        mask = None
        if window is not None and window < length:
            i = torch.arange(length, device=q.device)
            mask = (i[:, None] >= i) & (i[:, None] - i < window)
        outs.append(attend(*batch, mask, scale).transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)[None]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)


def _formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, *,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """softmax([cap tanh(q k scale / cap), sink]) [v, 0]; holds all scores, count x heads x length x length.

    sinks [heads]. The softmax is in fp32, as transformers' own.
    """
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)], -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).to(v.dtype)[..., :length] @ v


AttentionInterface.register(PACKED, packed_attention)
