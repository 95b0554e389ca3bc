"""What both vLLM engines ask: version, model, temperature, size of the cache."""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from transformers import AutoConfig

from rto_fast import distributed
from rto_fast.models.adapters import AdapterForm
from rto_fast.rollout.engine import GREEDY, Sampling
from rto_fast.rollout.vllm_engines.load_adapter import layer_rank

OLDEST, OLDEST_SERVED, NEWEST = "0.26", "0.32", "0.33"
"""Series of vLLM that may sample here, in the training process and as servers, and the newest that was read or tried.
Servers must tell the version of their weights, which they do from 0.32 on."""
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else the trainer's threads would be bound too
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Environment that vLLM reads; what the user has set stays."""
COLDEST = 0.01
"""Below this vLLM would sample at this temperature, with no more than a warning."""


def installed() -> str:
    """Version of vLLM here, whichever distribution brought it; empty when there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def too_old(version: str, oldest: str = OLDEST) -> str:
    """Why this version of vLLM is refused; empty when it is not. Warns where it is newer than all that were tried.

    A newer one that loads weights in another way is found by the proof at the start of a run.
    """
    try:
        series = Version(version).release[:2]
    except InvalidVersion:
        return f"vLLM's version {version!r} does not say its series ({oldest} or newer is needed)"
    if series < Version(oldest).release:
        return f"vLLM {version} is too old ({oldest} or newer is needed)"
    if series > Version(NEWEST).release:
        warnings.warn(f"vLLM {version} is newer than {NEWEST}, the newest that was tried", stacklevel=2)
    return ""


def unusable(model_path: str | Path, device: torch.device, oldest: str = OLDEST) -> str:
    """Why vLLM cannot sample from this model here; empty when it can. oldest: series that may."""
    version = installed()
    if not version:
        return "vLLM is not installed"
    if refused := too_old(version, oldest):
        return refused
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    try:
        from vllm import ModelRegistry
    except ImportError as error:
        return f"vLLM {version} cannot be imported ({error})"
    known = set(ModelRegistry.get_supported_archs())
    if not known & set(config.architectures or ()):
        return f"vLLM {version} does not know {config.architectures}"
    return _no_attention(config) if torch.device(device).type == "cpu" else ""


def no_form(form: AdapterForm) -> str:
    """Why no vLLM's own LoRA can compute with an adapter of this form; empty when it can."""
    if form.beyond:
        return f"vLLM's LoRA has no {form.beyond}"
    return "" if layer_rank(form.rank) else f"vLLM's LoRA has no rank of {form.rank}"


def no_adapter(model_path: str | Path, form: AdapterForm) -> str:
    """Why the vLLM here cannot compute with an adapter of this form on this model; empty when it can."""
    if refused := no_form(form):
        return refused
    from vllm import ModelRegistry
    from vllm.model_executor.models import supports_lora

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    known = [name for name in config.architectures or () if name in ModelRegistry.models]
    if not known or not supports_lora(ModelRegistry.models[known[0]].load_model_cls()):
        return f"vLLM has no LoRA for {config.architectures}"
    return ""


def _no_attention(config: Any) -> str:
    """Why vLLM's attention on a CPU cannot serve the model; empty when it can."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    text = config.get_text_config(decoder=True)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    return "" if head in sizes else f"vLLM on a CPU has no attention for heads of {head} (it has {str(sizes)[1:-1]})"


def temperature_of(sampling: Sampling) -> float:
    """As vLLM is told it; ValueError where it would sample at another one."""
    if GREEDY < sampling.temperature < COLDEST:
        raise ValueError(f"temperature: vLLM samples at {COLDEST} or more, got {sampling.temperature}")
    return sampling.temperature if sampling.temperature > GREEDY else 0.0  # vLLM's word for greedy


def cpu_cache_bytes(
    text: Any, dtype: torch.dtype, max_length: int, max_sequences: int, share: float, ranks: int = 1
) -> int:
    """This rank's keys and values of `max_sequences` full sequences of an engine of `ranks` ranks.

    At most this rank's `share` of the free memory.
    """
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = max(1, (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) // ranks)
    blocks = -(-max_length // 128) * 128  # vLLM's block on a CPU
    need = 2 * text.num_hidden_layers * heads * head * dtype.itemsize * blocks * (max_sequences + 2)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(need, int(share * free / distributed.world_size()))
