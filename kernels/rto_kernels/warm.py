"""Compiles the kernels of a training run before its first step.

Triton compiles a kernel where it is first launched, for seconds; a rank that meets a variant later than the others
would keep them waiting. The functions that a run calls are called here on zeros, at every size that has variants of its
own. What is compiled stays in Triton's cache on disk, for other processes and later runs.
"""

import time

import torch
from torch import Tensor

from .gae import gae, whiten_moments
from .linear_logprob import token_logprobs
from .linear_ppo import fused_linear_ppo_loss
from .ppo_loss import ppo_loss
from .token_rewards import token_rewards


def warm(
    hidden_size: int,
    vocab: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    tokens: int = 1,
    bias: bool = False,
    softcap: float | None = None,
    entropy_coef: float = 0.0,
    aggregation: str = "sequence",
    sampler: bool = False,
    pairs: bool = False,
    values: bool = True,
    backend: str | None = None,
) -> float:
    """Compile what a run of PPO, RTO, P3O or REBEL launches, and return the seconds that it took.

    hidden_size, vocab, dtype, bias, softcap   of the lm_head
    tokens         of the largest micro-batch: several chunks add up in variants of their own
    entropy_coef, aggregation                  of the policy loss
    sampler        whether tokens are weighted by the sampler's log-probs, in place of the fused loss
    pairs          whether the policy learns from log-probs of pairs (P3O, REBEL), in place of PPO's loss
    values         whether there is a critic

    Needs room for a weight [vocab, hidden_size] and what the update of `tokens` tokens holds besides; all of it is
    free again when the call returns. Raises what the functions raise.
    """
    start = time.perf_counter()
    device = torch.device(device)
    weight = torch.zeros(vocab, hidden_size, dtype=dtype, device=device, requires_grad=True)
    shift = torch.zeros(vocab, dtype=dtype, device=device, requires_grad=True) if bias else None
    head = {"bias": shift, "softcap": softcap, "backend": backend}
    options = {"entropy_coef": entropy_coef, "aggregation": aggregation}
    for count in sorted({1, tokens}):
        hidden = torch.zeros(count, hidden_size, dtype=dtype, device=device, requires_grad=True)
        if pairs:
            _log_probs(hidden, weight, head)
        else:
            _policy(hidden, weight, head, sampler, options)
        weight.grad = None
        _tokens(count, device, aggregation, values, backend)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _layout(count: int, device: torch.device) -> tuple[Tensor, Tensor, dict]:
    """A row of zeros [count], a one, and the arguments of one packed sequence."""
    row, one = torch.zeros(count, device=device), torch.ones((), device=device)
    return row, one, {"cu_seqlens": torch.tensor([0, count], device=device)}


def _log_probs(hidden: Tensor, weight: Tensor, head: dict) -> None:
    """Scoring, and log-probs with their gradient."""
    targets = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    with torch.no_grad():
        token_logprobs(hidden, weight, targets, **head)
    token_logprobs(hidden, weight, targets, **head).sum().backward()


def _policy(hidden: Tensor, weight: Tensor, head: dict, sampler: bool, options: dict) -> None:
    """Scoring and one update of the policy."""
    row, one, layout = _layout(hidden.shape[0], hidden.device)
    targets = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    terms = layout | options | {"whiten": (one.double(), one.double()), "denominator": one}
    with torch.no_grad():
        token_logprobs(hidden, weight, targets, **head)
    if sampler:
        logp, entropy = token_logprobs(hidden, weight, targets, return_entropy=True, **head)
        if not options["entropy_coef"]:
            entropy = entropy.detach()
        loss = ppo_loss(logp, row, row, entropy=entropy, sampler_logp=row, is_cap=1.0, **terms, backend=head["backend"])
    else:
        loss = fused_linear_ppo_loss(hidden, weight, targets, row, row, return_entropy=True, **terms, **head)
    loss.policy_loss.backward()


def _tokens(count: int, device: torch.device, aggregation: str, values: bool, backend: str | None) -> None:
    """Rewards, advantages and one update of the critic."""
    row, one, layout = _layout(count, device)
    layout["backend"] = backend
    token_rewards(row, row, row, row[:1], beta1=1.0, beta2=1.0, **layout)
    estimate = gae(row, row, bootstrap=row[:1] if values else None, **layout)
    whiten_moments(estimate.moments)
    if values:
        leaf = row.clone().requires_grad_()
        loss = ppo_loss(row, row, row, leaf, row, row, aggregation=aggregation, denominator=one, **layout)
        loss.value_loss.backward()
