"""Seconds of an iteration: operations and bytes over the rates of a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rto_fast.backend.frozen import partitions
from rto_fast.config import RTOConfig
from rto_fast.memory.phases import VLLM_WORK, Machine, Models, cache_of_token, merges, stands, uses_vllm, width
from rto_fast.memory.shapes import ModelShape


@dataclass(frozen=True)
class Rates:
    """What one device reaches, not what its data sheet says."""

    flops: float
    """Operations a second of matrix products in bf16."""
    memory: float
    """Bytes a second read from its own memory."""
    link: float
    """Bytes a second from the other ranks."""
    disk: float
    """Bytes a second that all ranks together write to disk."""


def seconds(config: RTOConfig, models: Models, machine: Machine, rates: Rates) -> dict[str, float]:
    """Seconds of the longest case: every prompt and every response as long as the limits let it be."""
    sequences = config.responses / machine.ranks
    tokens = sequences * (config.max_prompt_length + config.max_response_length)
    scored = [models.policy] * config.scores_policy + [s for _, s in models.frozen]
    scored += [models.critic] if models.critic else []
    scored += [models.online] * (1 + (config.online_order == "before")) if models.online else []
    score = sum(tokens * 2 * _computed(s) for s in scored) / rates.flops
    if partitions(config, machine.ranks, machine.kind):
        batches = math.ceil(tokens / config.score_tokens)
        spread = [s for _, s in models.frozen if config.zero_stage == 3 or not stands(config, s)]
        score += sum(batches * width(config) * s.parameters for s in spread) / rates.link
    out = {"rollout": _rollout(config, models.policy, machine, rates, sequences), "scoring": score}
    for name, s in models.trained:
        passes = 8 if config.recomputes(s.parameters + s.adapter) else 6
        passes -= 2 if config.lora_rank else 0  # no product for the gradient of a frozen matrix
        epochs = 1 if name == "online DPO" else config.ppo_epochs
        work = epochs * tokens * passes * _computed(s) / rates.flops
        if config.ptx_coef and name == "policy":  # as many supervised rows again
            work *= 2
        steps = epochs * config.responses / config.train_batch
        out[f"{name} update"] = work + steps * 2 * width(config) * s.trained / rates.link
    pushed = models.policy.adapter if config.lora_rank and not merges(config, machine) else models.policy.parameters
    out["weights to the sampler"] = 2 * width(config) * pushed / rates.memory
    out["checkpoint"] = checkpoint_bytes(config, models) / rates.disk if config.save_every else 0.0
    return out


def checkpoint_bytes(config: RTOConfig, models: Models) -> float:
    """Bytes of a checkpoint: what is trained, its fp32 weights and both moments, of every trained model."""
    return sum((width(config) + 12) * s.trained for _, s in models.trained)


def _computed(s: ModelShape) -> float:
    """Parameters that a token is multiplied with. The embedding is looked up; half of the tokens meet the head."""
    tables = s.vocab * s.hidden
    return s.parameters - tables / 2 if s.vocab else s.parameters


def _rollout(config: RTOConfig, s: ModelShape, machine: Machine, rates: Rates, sequences: float) -> float:
    """Decoding reads the weights once a step and every sequence's cache; the steps' products go on top."""
    split = config.vllm_tensor_parallel
    longest = config.max_prompt_length + config.max_response_length
    at_once: float = max(1, config.rollout_tokens // longest)
    if uses_vllm(config, machine):
        room = config.vllm_memory_share * machine.device - width(config) * s.parameters / split - VLLM_WORK
        cached = room * split / (longest * cache_of_token(config, s))
        at_once = max(1.0, min(config.vllm_max_sequences, cached, sequences * split))
    rounds = sequences * split / at_once
    mean = config.max_prompt_length + config.max_response_length / 2
    read = (width(config) * s.parameters + at_once * mean * cache_of_token(config, s)) / split
    products = sequences * longest * 2 * _computed(s) / rates.flops
    return rounds * config.max_response_length * read / rates.memory + products
