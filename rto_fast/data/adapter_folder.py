"""What a folder with a LoRA adapter says of itself, before any weight is read.

PEFT's own format: adapter_config.json and adapter_model.safetensors. Beside them rto_adapter.json holds what PEFT has
no place for: fingerprints of the base's weights, and the mean and std of a reward model's scores.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rto_fast.errors import ConfigError, require

ADAPTER, ADAPTER_WEIGHTS, ADAPTER_RECORD = "adapter_config.json", "adapter_model.safetensors", "rto_adapter.json"
FETCHED = ("*.json", "adapter_model.*", "tokenizer*", "*.model", "*.txt", "*.jinja")
"""Files of a Hub id that is an adapter's; whole weights beside it are not wanted."""


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk."""

    path: str
    """Of a Hub id the folder in the cache that it was fetched to."""
    base: str
    """Folder or Hub id of the model that it belongs to."""
    settings: dict[str, Any]
    """PEFT's, as adapter_config.json holds them."""
    record: dict[str, Any]
    """rto_adapter.json, {} where another program has written the adapter."""

    @property
    def weights(self) -> Path:
        return Path(self.path) / ADAPTER_WEIGHTS


def read_adapter(path: str | Path, argument: str) -> AdapterFolder | None:
    """The adapter in a folder or of a Hub id, which is fetched; None where there is none.

    Raises ConfigError, naming `argument`, where an adapter is not whole, not LoRA's, or lies beside whole weights.
    """
    folder = Path(path) if Path(path).exists() else _fetched(str(path))
    if not (folder / ADAPTER).is_file():
        return None
    what = f"{argument}: {str(path)!r}"
    whole = [p.name for p in folder.glob("*.safetensors") if p.name != ADAPTER_WEIGHTS]
    if whole or (folder / "config.json").exists():
        raise ConfigError(
            f"{what} holds whole weights and an adapter ({ADAPTER}) beside them, which would be applied on top; if it "
            "is merged already, delete the adapter's files, else move them to a folder of their own"
        )
    require((folder / ADAPTER_WEIGHTS).is_file(), f"{what} holds {ADAPTER} and no {ADAPTER_WEIGHTS}; copy both")
    settings = _object(folder / ADAPTER, argument)
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    require(kind == "LORA", f"{what} is an adapter of the kind {kind!r}; LORA is supported, merge any other by PEFT")
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{what} does not name its base; set base_model_name_or_path in {ADAPTER} to its folder or Hub id"
        )
    require(
        not (Path(base) / ADAPTER).is_file(),
        f"{what}: its base {base!r} is an adapter too; merge that one: rto-fast export {base} --merge --to FOLDER",
    )
    record = folder / ADAPTER_RECORD
    return AdapterFolder(str(folder), base, settings, _object(record, argument) if record.is_file() else {})


def base_of(path: str | Path, argument: str = "model") -> str:
    """The base of an adapter's folder; any other path or Hub id as it is."""
    adapter = read_adapter(path, argument)
    return adapter.base if adapter else str(path)


def holder_of(path: str, file: str) -> str:
    """The folder that has `file` of a model: an adapter's own, else its base."""
    adapter = read_adapter(path, "model")
    own = adapter.path if adapter else path
    return own if not adapter or (Path(own) / file).is_file() else adapter.base


@cache
def _fetched(name: str) -> Path:
    """The folder in the cache with a Hub id's adapter and tokenizer; the name itself where there is no adapter."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return Path(name)
    from huggingface_hub import snapshot_download
    from transformers.utils import cached_file

    try:
        if cached_file(name, ADAPTER, _raise_exceptions_for_missing_entries=False) is None:
            return Path(name)
        return Path(snapshot_download(name, allow_patterns=[*FETCHED], ignore_patterns=["config.json"]))
    except OSError:  # no such id, or no way to it: whoever loads the model says so
        return Path(name)


def _object(path: Path, argument: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{argument}: {str(path)!r} cannot be read ({error}); write the adapter anew") from error
    require(isinstance(found, dict), f"{argument}: {str(path)!r} holds no JSON object; write the adapter anew")
    return found
