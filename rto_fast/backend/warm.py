"""Compile a run's kernels before its first step.

Else each rank compiles when it first meets a shape, and the others wait for it.
"""

from __future__ import annotations

from typing import Any

import rto_kernels
import torch

from rto_fast.config import RTOConfig
from rto_fast.errors import ConfigError
from rto_fast.models.load import DTYPES


def warm(config: RTOConfig, policy: Any, device: torch.device) -> str:
    """Compiles what scoring and the updates launch on a GPU, and says how long it took; "" where nothing is compiled.

    policy: a PolicyModel, of whose lm_head the sizes alone are read. Called before a sampler claims the GPU's memory.
    Raises ConfigError where the file of measured tiles cannot be read.
    """
    if device.type != "cuda":
        return ""
    head = policy.lm.get_output_embeddings()
    try:
        seconds = rto_kernels.warm(
            head.in_features, head.out_features, dtype=DTYPES[config.dtype], device=device,
            tokens=config.micro_tokens, bias=head.bias is not None, softcap=head.softcap,
            entropy_coef=config.entropy_coef, aggregation=config.loss_aggregation,
            sampler=config.behaviour == "sampler", pairs=config.policy_update in ("p3o", "rebel"),
            values=config.uses_critic,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except torch.OutOfMemoryError:  # it needs an lm_head and its gradient more than the run holds by now
        torch.cuda.empty_cache()
        return "kernels are compiled when they are first met: there is no room for a second lm_head"
    torch.cuda.empty_cache()
    return f"kernels ready after {seconds:.1f} s"
