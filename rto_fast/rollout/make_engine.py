"""Makes the rollout engine that the settings name."""

from __future__ import annotations

from pathlib import Path

import torch

from rto_fast.config import RTOConfig
from rto_fast.data.adapter_folder import base_of
from rto_fast.errors import ConfigError
from rto_fast.models.adapters import AdapterForm
from rto_fast.rollout.engine import RolloutEngine


def make_engine(
    config: RTOConfig,
    model_path: str | Path,
    device: torch.device | str,
    dtype: torch.dtype,
    pad_token_id: int,
    adapter: AdapterForm | None = None,
) -> RolloutEngine:
    """The engine that `config.rollout_engine` names, holding the model at `model_path` as version 0.

    Of an adapter it holds the base: the merged weights are to be pushed before it samples, or the adapter alone where
    the engine takes that. adapter: the form of the one that may be pushed so.

    auto: vLLM where it is installed and can sample from the model, else transformers.
    """
    from rto_fast.rollout.vllm_engines import colocated, servers
    from rto_fast.rollout.vllm_engines.support import unusable

    model_path = base_of(model_path)
    if config.rollout_engine == "vllm-serve":
        return servers.from_config(config, model_path, torch.device(device), dtype, adapter)
    if config.rollout_engine == "vllm" or (
        config.rollout_engine == "auto" and not unusable(model_path, torch.device(device))
    ):
        return colocated.from_config(config, model_path, torch.device(device), dtype, adapter)
    if config.rollout_engine in ("auto", "transformers"):
        from rto_fast.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(model_path, device, dtype, pad_token_id, config.rollout_tokens)
    raise ConfigError(
        f"rollout_engine: {config.rollout_engine!r} is unknown; use auto, transformers, vllm or vllm-serve"
    )
