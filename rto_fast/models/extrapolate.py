"""A model beyond another: (1 + alpha) * new - alpha * old, weight by weight.

rto-fast extrapolate --new runs/dpo2/model --old runs/dpo1/model --alpha 0.3 --to runs/reference3

The momentum step of accelerated preference optimisation (arXiv 2410.06293), on weights in place of log-probs: the next
round of DPO starts from the result and refers to it. Exit code 2: the input cannot work, and nothing was written.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rto_fast import cli
from rto_fast.config import expand_home
from rto_fast.data.tokenizer import load_tokenizer, tokenizer_difference
from rto_fast.errors import ConfigError, require
from rto_fast.logs.files import folder_aside
from rto_fast.models.load import check_weights, load_config

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Weights that may be added; others are quantised, or no weights."""
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf")
"""Endings of files that would hold new's weights as they were, and are left out."""


@dataclass(frozen=True, kw_only=True)
class ExtrapolateConfig:
    """Weights beyond a model, away from an earlier one: a next round's reference."""

    new: str = ""
    """Folder of the later model, in safetensors; the result has its dtype, config and tokenizer."""
    old: str = ""
    """Folder of the earlier model."""
    alpha: float = 0.3
    """The result is (1 + alpha) * new - alpha * old; 0 = new, between -1 and 0 a mean of the two."""
    to: str = ""
    """Folder to write; must not exist."""

    def __post_init__(self) -> None:
        expand_home(self)

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        for name in ("new", "old", "to"):
            require(bool(getattr(self, name)), f"{name}: missing; pass --{name}")
        require(math.isfinite(self.alpha), f"alpha: must be a number, got {self.alpha}")
        require(not Path(self.to).exists(), f"to: {self.to} exists already")
        for name in ("new", "old"):
            path = getattr(self, name)
            remedy = f"fetch a model of the Hub first: hf download {path} --local-dir FOLDER"
            require(Path(path).is_dir(), f"{name}: {path!r} is no folder; {remedy}")


def extrapolate(config: ExtrapolateConfig) -> Path:
    """Writes the folder and returns it; one tensor of each model is in memory at a time.

    Raises ConfigError where the two are not models of one shape and tokenizer, or a weight would overflow.
    """
    config.validate()
    new, old = Path(config.new), Path(config.old)
    places = [_checked(folder, name) for folder, name in ((new, "new"), (old, "old"))]
    _check_same(config, *places)
    with folder_aside(Path(config.to)) as aside:
        for path in (p for p in new.iterdir() if p.is_file() and p.suffix not in OTHER_WEIGHTS):
            shutil.copyfile(path, aside / path.name)
        for file in sorted(set(places[0].values())):
            _overwrite(aside / file.name, file, places[1], config)
    print(f"{len(places[0])} tensors, {1 + config.alpha:g} * new - {config.alpha:g} * old: {config.to}")
    return Path(config.to)


def _checked(folder: Path, name: str) -> dict[str, Path]:
    """{tensor: its safetensors file}."""
    load_config(str(folder), name)
    check_weights(str(folder), name)
    places: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            places |= dict.fromkeys(tensors.keys(), file)
    require(bool(places), f"{name}: {str(folder)!r} holds no safetensors; save the model in that format")
    return places


def _check_same(config: ExtrapolateConfig, new: dict[str, Path], old: dict[str, Path]) -> None:
    """ConfigError where the models differ in more than their weights' values; reads headers alone."""
    if lost := sorted(new.keys() ^ old.keys()):
        holder, other = ("new", "old") if lost[0] in new else ("old", "new")
        raise ConfigError(f"old: {holder} has a tensor {lost[0]!r} that {other} lacks ({len(lost)} in all differ)")
    for name, file in new.items():
        with safe_open(file, "pt") as ours, safe_open(old[name], "pt") as theirs:
            a, b = (tensors.get_slice(name) for tensors in (ours, theirs))
            require(
                a.get_shape() == b.get_shape(),
                f"old: {name} has the shape {b.get_shape()}, new's has {a.get_shape()}",
            )
    ours, theirs = (load_tokenizer(getattr(config, n), n) for n in ("new", "old"))
    difference = tokenizer_difference(ours, theirs, ours.all_special_tokens)
    require(not difference, f"old: {config.old!r} has another tokenizer than new ({difference})")


def _overwrite(target: Path, source: Path, old: dict[str, Path], config: ExtrapolateConfig) -> None:
    """Puts the extrapolated tensors into a copy of `source`, whose header stays."""
    with target.open("r+b") as file, safe_open(source, "pt") as ours:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for name in ours.keys():  # noqa: SIM118 (safe_open is no mapping)
            with safe_open(old[name], "pt") as theirs:
                tensor = _beyond(ours.get_tensor(name), theirs.get_tensor(name), name, config.alpha)
            file.seek(8 + length + header[name]["data_offsets"][0])
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _beyond(new: Tensor, old: Tensor, name: str, alpha: float) -> Tensor:
    """new + alpha * (new - old) in at least fp32, in new's dtype; tensors of other types must be the same in both."""
    if new.dtype == old.dtype and torch.equal(new, old):
        return new
    plain = {new.dtype, old.dtype} <= set(PLAIN)
    remedy = "pass models whose weights are bf16, fp16 or fp32"
    require(plain, f"new: {name} cannot be added ({new.dtype} and {old.dtype}); {remedy}")
    wide = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    out = (new.to(wide) + alpha * (new.to(wide) - old.to(wide))).to(new.dtype)
    finite = bool(out.isfinite().all())
    require(finite, f"alpha: {alpha:g} takes {name} beyond {new.dtype}, or it is not finite already")
    return out


if __name__ == "__main__":
    cli.main(ExtrapolateConfig(), "rto_fast.models.extrapolate:extrapolate")
