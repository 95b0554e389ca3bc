"""A checkpoint as Hugging Face folders.

It needs neither the run that wrote it nor a GPU.

rto-fast export runs/rto --to exported            # the newest checkpoint
rto-fast export runs/rto --to exported --step 40
rto-fast export runs/dpo/model --merge --to whole # an adapter's folder as whole weights
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from rto_fast.backend.checkpoints import find_checkpoint
from rto_fast.config import TEMPLATE_DATE, Lora, LoraSettings
from rto_fast.data.adapter_folder import AdapterFolder, base_of, read_adapter
from rto_fast.data.chat_template import TEMPLATE_FILE, load_template
from rto_fast.data.tokenizer import load_tokenizer
from rto_fast.errors import REFUSED, ConfigError, StorageError, require, shown
from rto_fast.logs.files import folder_aside
from rto_fast.models.adapters import merge
from rto_fast.models.heads import PolicyModel, ScalarModel
from rto_fast.models.load import (
    DTYPES,
    check_weights,
    is_reward_model,
    load_config,
    load_policy,
    load_scalar,
    new_scalar,
)
from rto_fast.models.save import export, save_model


@dataclass(frozen=True)
class ExportConfig:
    """Turns a run's checkpoint into Hugging Face folders, or an adapter into a whole model."""

    run: tyro.conf.Positional[str]
    """The run's output_dir; with `merge` also the folder of an adapter."""
    to: str
    """Folder to write; must not exist."""
    step: int = 0
    """Checkpoint to take; 0 = the newest."""
    merge: bool = False
    """Write whole weights, adapters merged into their base."""
    trust_run_folder: bool = False
    """Read checkpoints that another user owns. They are pickles: reading one can run code that its writer chose."""


def export_checkpoint(config: ExportConfig) -> list[Path]:
    """Writes one folder a trained model (`policy` and `critic`, or `model`) and returns them.

    Raises ConfigError where there is no such checkpoint or the target exists.
    """
    target = Path(config.to).expanduser()
    require(not target.exists(), f"to: {target} exists already")
    if adapter := read_adapter(Path(config.run).expanduser(), "run"):
        require(config.merge, f"run: {config.run} is an adapter already; pass --merge for whole weights")
        _say_base(adapter.base, adapter.record.get("base_dtype", "off"))
        return [_merged(adapter, target)]
    folder, record = find_checkpoint(Path(config.run).expanduser(), config.step, config.trust_run_folder)
    settings = record["config"]
    argument = "policy" if "policy" in settings else "model"
    base = settings[argument]
    tokenizer = load_tokenizer(base, argument)
    day = settings.get("template_date", TEMPLATE_DATE)
    template = load_template(settings["chat_template"], tokenizer, day)
    loading: dict[str, Any] = {"dtype": DTYPES[settings["dtype"]], "attention": "sdpa", "argument": argument}
    names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    if config.merge:
        _say_base(base_of(base, argument), settings.get("lora_base_dtype", "off"))
    with folder_aside(target) as aside:
        for name in names:
            model = _model_of(folder, name, record, base, loading)
            if config.merge and model.adapter:
                merge(model)
            save_model(model, aside / name, tokenizer, template, writes=True)
    return [target / name for name in names]


def _model_of(
    folder: Path, name: str, record: dict[str, Any], base: str, loading: dict[str, Any]
) -> PolicyModel | ScalarModel:
    """The checkpoint's model `name`, on the architecture of `base`."""
    state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=name)
    model: PolicyModel | ScalarModel
    lora = _lora_of(record["config"])
    if any(key.startswith("lm.") for key in state):
        model = load_policy(base, lora=lora, **loading)
    else:
        model = new_scalar(base, lora=lora, **loading)
        model.mean, model.std = record["state"].get("critic_normalisation", (0.0, 1.0))
    missing, unexpected = model.load_state_dict(state, strict=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    missing = [n for n in missing if n in trained and not n.endswith("lm_head.weight")]
    if unexpected or missing:
        raise ConfigError(f"run: {folder / name} does not fit {base!r}: {[*missing, *unexpected][:4]}")
    return model


def _lora_of(settings: dict[str, Any]) -> Lora | None:
    """The adapter that a run of these settings trained."""
    names = {f.name for f in dataclasses.fields(LoraSettings)}
    found: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in settings.items() if name in names
    }
    lora = LoraSettings(**found).lora
    return lora and dataclasses.replace(lora, base_dtype="off")


def _say_base(base: str, kind: str) -> None:
    """A line for an adapter whose base was not whole in training."""
    if kind != "off":
        print(f"trained on {base} in {kind}, merged into its whole weights: log-probs differ by what {kind} rounds")


def _merged(adapter: AdapterFolder, target: Path) -> Path:
    """An adapter's folder as a whole model under `target`, in the dtype of its base."""
    path = adapter.path
    check_weights(path, "run")
    tokenizer = load_tokenizer(path, "run")
    record = Path(path) / TEMPLATE_FILE
    dtype = getattr(load_config(path, "run"), "dtype", None) or torch.float32
    load = load_scalar if is_reward_model(path, "run") else load_policy
    model = load(path, dtype=dtype, attention="sdpa", argument="run")
    with folder_aside(target) as aside:
        export(model, aside, write=True)
        tokenizer.save_pretrained(aside)
        if record.is_file():
            shutil.copy(record, aside)
    return target


def main(args: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = tyro.cli(ExportConfig, description=ExportConfig.__doc__, args=args, prog="rto-fast export")
    try:
        for folder in export_checkpoint(config):
            print(folder)
    except (ConfigError, StorageError) as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
