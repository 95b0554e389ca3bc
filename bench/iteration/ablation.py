"""Ours with one thing switched off: what packing, the response-only head and the fused kernels each give.

Each entry of ABLATION is a context manager; inside it the trainer's own code runs, on other parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from unittest import mock

import rto_kernels
import torch

from bench.kernels.peers import eager_logp
from rto_fast.contract import offsets, ragged_arange
from rto_fast.models import heads, packing
from rto_fast.models.heads import PolicyModel
from rto_fast.models.packing import PackedBatch

FILL = 0  # the token that sequences are filled up with; nothing looks at it


def _padded_batch(make: Callable[..., PackedBatch]) -> Callable[..., PackedBatch]:
    """PackedBatch.make with every sequence filled up to the longest; only the real response tokens count."""

    def padded(sequences, prompt_lens, device, kernel):
        width = max(s.numel() for s in sequences)
        full = [torch.cat([s, s.new_full((width - s.numel(),), FILL)]) for s in sequences]
        batch = make(full, prompt_lens, device, kernel)
        starts = torch.arange(len(sequences)) * width
        lens, prompts = torch.tensor([s.numel() for s in sequences]), torch.tensor(list(prompt_lens))
        states = ragged_arange(starts + prompts - 1, lens - prompts)
        return replace(
            batch, state_positions=states.to(device), response_tokens=torch.cat(full)[states + 1].to(device),
            cu_responses=offsets(lens - prompts).to(device), last_positions=(starts + lens - 1).to(device),
        )  # fmt: skip

    return padded


def _padded_micro_batches(index: Sequence[int], lens: Sequence[int], budget: int) -> list[list[int]]:
    """In the order they come, each batch at most `budget` tokens once filled up."""
    batches: list[list[int]] = []
    for i in index:
        longest = max(lens[j] for j in (*batches[-1], i)) if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@contextmanager
def without_packing() -> Iterator[None]:
    with (
        mock.patch.object(PackedBatch, "make", staticmethod(_padded_batch(PackedBatch.make))),
        mock.patch.object(packing, "micro_batches", _padded_micro_batches),
    ):
        yield


def _head_on_every_position(self, batch, read=None):
    """The head reads every other position too, forward only, and that is dropped."""
    hidden, head = heads.hidden_states(self.lm.base_model, batch), self.lm.get_output_embeddings()
    following = torch.cat([batch.tokens[1:], batch.tokens[:1]])
    others = torch.ones_like(following, dtype=torch.bool)
    others[batch.state_positions] = False
    with torch.no_grad():
        head(hidden[others], following[others], heads.token_logprobs)
    return head(hidden[batch.state_positions], batch.response_tokens, read or heads.token_logprobs)


def without_response_only_head():
    return mock.patch.object(PolicyModel, "forward", _head_on_every_position)


def _eager_token_logprobs(hidden, weight, targets, *, bias=None, temperature=1.0, softcap=None, return_entropy=False):
    assert bias is None
    assert not softcap
    logits = hidden @ weight.T
    logits = logits if temperature == 1 else logits / temperature
    logp = eager_logp(logits, targets)
    if not return_entropy:
        return logp
    log_p = torch.log_softmax(logits.float(), -1)
    return logp, -(log_p.exp() * log_p).sum(-1)


def _eager_linear_ppo_loss(
    hidden, weight, targets, old_logp, advantages, *, bias, temperature, softcap, entropy_coef, return_entropy, **how
):
    assert return_entropy
    logp, entropy = _eager_token_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, return_entropy=True
    )
    entropy = entropy if entropy_coef else entropy.detach()
    return rto_kernels.ppo_loss(logp, old_logp, advantages, entropy=entropy, entropy_coef=entropy_coef, **how)


@contextmanager
def without_kernels() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(heads, "token_logprobs", _eager_token_logprobs))
        stack.enter_context(mock.patch.object(rto_kernels, "fused_linear_ppo_loss", _eager_linear_ppo_loss))
        for name in ("token_rewards", "gae", "ppo_loss"):
            plain = partial(getattr(rto_kernels, name), backend="torch")
            stack.enter_context(mock.patch.object(rto_kernels, name, plain))
        yield


ABLATION = {
    "ours": nullcontext,
    "without packing": without_packing,
    "without response-only head": without_response_only_head,
    "without fused kernels": without_kernels,
}
