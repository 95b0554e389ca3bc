"""Steps of a decoding loop: uniforms, draw, distributions, attention, cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

ATTENTION = "rto_rollout"
"""Name under which `grouped_attention` is registered with transformers."""


def uniforms(seeds: Sequence[int], count: int) -> np.ndarray:
    """[count, len(seeds)] float64 in [0, 1 - 2**-52]; column i depends on seeds[i] alone.

    SplitMix64 (Steele, Lea, Flood 2014) at states seed + (t + 1) * gamma: 64 bits of seed, where torch's CPU
    generator keeps 32, and all requests at once. The upper end keeps u * total below total after rounding.
    """
    with np.errstate(over="ignore"):
        steps = np.arange(1, count + 1, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
        z = np.asarray(seeds, dtype=np.uint64)[None, :] + steps
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.minimum((z >> np.uint64(11)) * 2.0**-53, 1 - 2.0**-52)


def sample(logits: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """[B, V] logits, [B] float64 uniforms -> ([B, 1] int64 token, [B, 1] fp32 log-prob).

    A token of probability 0 is never taken: cdf[v - 1] <= u * total < cdf[v] needs p_v > 0.
    """
    if temperature != 1:
        logits = logits.float() / temperature
    logp = torch.log_softmax(logits, -1, dtype=torch.float32)
    cdf = logp.exp().cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)
    token.clamp_(max=logits.shape[-1] - 1)  # only NaN goes past the end; its log-prob is NaN and is reported
    return token, logp.gather(-1, token)


def log_probs(logits: Tensor) -> Tensor:
    """[..., V] logits of any dtype -> fp32 log-probs of every token."""
    return torch.log_softmax(logits, -1, dtype=torch.float32)


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention [B, H, 1, D] x [B, H_kv, T, D] -> [B, 1, H, D] without repeating keys and values.

    The H / H_kv query heads that share a key head stand as that many queries. Prefill goes to transformers'.
    """
    batch, heads, queries, dim = query.shape
    if queries != 1 or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    kv_heads, length = key.shape[1:3]
    if query.dtype != torch.float32 or query.device.type != "cpu":
        grouped = query.reshape(batch, kv_heads, -1, dim)
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return out.reshape(batch, 1, heads, -1), None
    # For one query a row, PyTorch's fused attention on the CPU is 1.4 to 2 times slower than this.
    scale = dim**-0.5 if scaling is None else scaling
    scores = torch.bmm(query.reshape(batch * kv_heads, -1, dim) * scale, key.flatten(0, 1).transpose(1, 2))
    if attention_mask is not None:
        scores.view(batch, kv_heads, -1, length).add_(attention_mask)
    out = torch.bmm(scores.softmax(-1), value.flatten(0, 1))
    return out.view(batch, 1, heads, -1), None


AttentionInterface.register(ATTENTION, grouped_attention)


class FixedLayer(DynamicLayer):
    """Keys and values of one layer in [B, H_kv, width, D] buffers, allocated once and filled in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        self.keys = key_states.new_empty(batch, heads, self.width, dim)
        self.values = value_states.new_empty(batch, heads, self.width, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_seq_length(self) -> int:
        return self.filled

    def move(self, target: Tensor, source: Tensor, rows: int) -> None:
        """Copies rows `source` over rows `target` and keeps the first `rows`."""
        for buffer in (self.keys, self.values):
            buffer[target, :, : self.filled] = buffer[source, :, : self.filled]
        self.keys, self.values = self.keys[:rows], self.values[:rows]
