"""A checkpoint as Hugging Face folders.

It needs neither the run that wrote it nor a GPU.

rto-fast export runs/rto --to exported            # the newest checkpoint
rto-fast export runs/rto --to exported --step 40
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from rto_fast.backend.checkpoints import find_checkpoint
from rto_fast.config import TEMPLATE_DATE
from rto_fast.data.chat_template import load_template
from rto_fast.data.tokenizer import load_tokenizer
from rto_fast.errors import REFUSED, ConfigError, StorageError, require, shown
from rto_fast.logs.files import folder_aside
from rto_fast.models.heads import PolicyModel, ScalarModel
from rto_fast.models.load import DTYPES, load_policy, new_scalar
from rto_fast.models.save import save_model


@dataclass(frozen=True)
class ExportConfig:
    """Turns a run's checkpoint into Hugging Face folders."""

    run: tyro.conf.Positional[str]
    """The run's output_dir."""
    to: str
    """Folder to write; must not exist."""
    step: int = 0
    """Checkpoint to take; 0 = the newest."""
    trust_run_folder: bool = False
    """Read checkpoints that another user owns. They are pickles: reading one can run code that its writer chose."""


def export_checkpoint(config: ExportConfig) -> list[Path]:
    """Writes one folder a trained model (`policy` and `critic`, or `model`) and returns them.

    Raises ConfigError where there is no such checkpoint or the target exists.
    """
    target = Path(config.to).expanduser()
    require(not target.exists(), f"to: {target} exists already")
    folder, record = find_checkpoint(Path(config.run).expanduser(), config.step, config.trust_run_folder)
    settings = record["config"]
    argument = "policy" if "policy" in settings else "model"
    base = settings[argument]
    tokenizer = load_tokenizer(base, argument)
    day = settings.get("template_date", TEMPLATE_DATE)
    template = load_template(settings["chat_template"], tokenizer, day)
    loading: dict[str, Any] = {"dtype": DTYPES[settings["dtype"]], "attention": "sdpa", "argument": argument}
    names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    with folder_aside(target) as aside:
        for name in names:
            model = _model_of(folder, name, record, base, loading)
            save_model(model, aside / name, tokenizer, template, writes=True)
    return [target / name for name in names]


def _model_of(
    folder: Path, name: str, record: dict[str, Any], base: str, loading: dict[str, Any]
) -> PolicyModel | ScalarModel:
    """The checkpoint's model `name`, on the architecture of `base`."""
    state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=name)
    model: PolicyModel | ScalarModel
    if any(key.startswith("lm.") for key in state):
        model = load_policy(base, **loading)
    else:
        model = new_scalar(base, **loading)
        model.mean, model.std = record["state"].get("critic_normalisation", (0.0, 1.0))
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = [n for n in missing if n.endswith("lm_head.weight")]
    if unexpected or len(missing) > len(tied):
        raise ConfigError(f"run: {folder / name} does not fit {base!r}: {[*missing, *unexpected][:4]}")
    return model


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
