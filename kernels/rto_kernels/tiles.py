"""Every tile choice of the vocabulary-sized kernels, in one place.

A choice depends on (H, V, dtype, chip), never on the number of tokens: that keeps a row's bits the same
whatever its batch. Measured choices live in a JSON file that outlives the process ($RTO_KERNELS_TILES, else
~/.cache/rto_kernels/tiles.json); `python -m rto_kernels.tune` writes it, and what it lacks is answered by the
defaults below.
"""

import functools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ._dispatch import INTERPRET

# At most this many vocabulary splits, so that the partial results of a launch stay small.
MAX_SPLITS = 64
# At least this many column tiles in a split (but under the interpreter), so that a program has work to do.
MIN_PER_SPLIT = 2 if INTERPRET else 8
# FMA contraction is Triton's default up to 3.9 and not from 3.10 on; results shall not depend on the release.
FUSION = {"enable_fp_fusion": True}
# Of the kernels that tiles are for. A measured choice holds for the revision and the Triton that it was measured with.
REVISION = 2


class Tile(NamedTuple):
    """A block of `rows` × `columns` of the result, `depth` of the inner dimension at a time.

    What follows the product works on `parts` (1 or 2) column parts of the block: registers hold no more.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    parts: int = 2
    # Left to itself (0) the assembler spills a few, for an occupancy that shared memory rules out.
    registers: int = 255

    @property
    def part(self) -> int:
        return self.columns // self.parts

    @property
    def launch(self) -> dict:
        bound = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **bound, **FUSION}


class Tiles(NamedTuple):
    """The tiles of one problem. The logits' epilogue decides what fits in registers."""

    plain: Tile  # logits without bias, soft-cap and kept probabilities
    saving: Tile  # the same, with probabilities written
    full: Tile  # logits with a bias or a soft-cap, and d(logits)
    product: Tile  # d(hidden) and d(weight) from d(logits); its `depth` divides the others' `rows`

    def logits(self, bias: bool, softcap: bool, save: bool) -> Tile:
        return self.full if bias or softcap else self.saving if save else self.plain


def _tiles(plain: Tile, full: Tile, product: Tile) -> Tiles:
    """Where probabilities are written with the tile of everything else that is not plain."""
    return Tiles(plain, full, full, product)


# (chip, 2-byte or 4-byte items, tensor descriptors usable) → tiles. Each was compiled for its chip: no loop
# over the inner dimension spills.
_POINTERS_2 = _tiles(Tile(128, 64, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(128, 128, 32, 8, 3))
_POINTERS_4 = _tiles(Tile(64, 64, 32, 8, 3), Tile(64, 64, 16, 8, 3), Tile(64, 64, 32, 8, 3))
_DESCRIPTORS_2 = _tiles(Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3))
_DESCRIPTORS_4 = _tiles(Tile(128, 128, 32, 8, 3), Tile(128, 128, 32, 8, 3), Tile(128, 128, 32, 8, 3))
_DEFAULTS = {
    ("sm80", 2, False): _POINTERS_2,
    ("sm80", 4, False): _POINTERS_4,
    # Measured on an H100 (bench/LOG.md).
    ("sm90", 2, True): _DESCRIPTORS_2._replace(saving=Tile(128, 256, 64, 8, 4)),
    ("sm90", 2, False): _POINTERS_2,
    ("sm90", 4, True): _DESCRIPTORS_4,
    ("sm90", 4, False): _POINTERS_4,
    # Triton 3.9 fails to lower a block split in two that is stored through a descriptor there.
    ("sm100", 2, True): _DESCRIPTORS_2._replace(
        plain=Tile(128, 256, 64, 8, 3, registers=0),
        saving=Tile(128, 64, 64, 8, 3, parts=1),
        full=Tile(128, 64, 64, 8, 3, parts=1),
    ),
    ("sm100", 2, False): _POINTERS_2,
    ("sm100", 4, True): _DESCRIPTORS_4._replace(
        plain=Tile(128, 64, 32, 8, 3), saving=Tile(64, 64, 32, 8, 3), full=Tile(64, 64, 32, 8, 3)
    ),
    ("sm100", 4, False): _POINTERS_4,
}
# Under the interpreter small sizes must still cross tile and split borders.
_INTERPRETED = _tiles(Tile(16, 32, 32, 4, 1), Tile(16, 32, 32, 4, 1), Tile(16, 32, 16, 4, 1))


@functools.cache
def chip_of(device: torch.device) -> str:
    """sm80, sm90 or sm100, whose tiles run on the device; "cpu" off a GPU.

    sm80's need the least and serve every other chip: consumer Blackwell (sm_120) has sm100's instructions for
    copies but 99 KiB of shared memory, where sm90's and sm100's tiles take up to 227.
    """
    if device.type != "cuda":
        return "cpu"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")


def cache_path() -> Path:
    given = os.environ.get("RTO_KERNELS_TILES")
    return Path(given) if given else Path.home() / ".cache" / "rto_kernels" / "tiles.json"


def _measured(path: Path) -> dict[str, list]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _key(width: int, vocab: int, itemsize: int, chip: str, descriptors: bool) -> str:
    operands = "tma" if descriptors else "pointers"
    return f"{chip} H{width} V{vocab} {8 * itemsize}bit {operands}, kernels {REVISION}, Triton {triton.__version__}"


def measured(width: int, vocab: int, itemsize: int, device: torch.device) -> bool:
    """Whether the tuner has written tiles for this problem on this device."""
    known, chip = _measured(cache_path()), chip_of(device)
    return any(_key(width, vocab, itemsize, chip, descriptors) in known for descriptors in (False, True))


_trial: ContextVar[Tiles | None] = ContextVar("trial", default=None)


@contextmanager
def trying(choice: Tiles) -> Iterator[None]:
    """Inside, every problem is given these tiles."""
    token = _trial.set(choice)
    try:
        yield
    finally:
        _trial.reset(token)


def choose(width: int, vocab: int, itemsize: int, chip: str, descriptors: bool) -> Tiles:
    """The tiles for hidden [·, width] and weight [vocab, width] of `itemsize` bytes."""
    if trial := _trial.get():
        return trial
    if chip == "cpu":
        return _INTERPRETED
    # The path is part of what is remembered, and costs a tenth of a millisecond to work out.
    return _chosen(width, vocab, itemsize, chip, descriptors, os.environ.get("RTO_KERNELS_TILES"))


@functools.cache
def _chosen(width: int, vocab: int, itemsize: int, chip: str, descriptors: bool, _: str | None) -> Tiles:
    measured = _measured(cache_path()).get(_key(width, vocab, itemsize, chip, descriptors))
    if measured:
        return Tiles(*(Tile(*t) for t in measured))
    return _DEFAULTS[chip, itemsize, descriptors]


def remember(width: int, vocab: int, itemsize: int, chip: str, descriptors: bool, tiles: Tiles) -> None:
    """Write a measured choice for later processes; this one keeps what it has, and so its results."""
    path = cache_path()
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    known[_key(width, vocab, itemsize, chip, descriptors)] = [list(t) for t in tiles]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and moved, so that a reader never meets half a file.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as out:
        json.dump(known, out, indent=1)
    os.replace(out.name, path)


def row_block(vocab: int) -> dict:
    """Elements of a row of logits that a program holds at once, and its warps."""
    width = 1 << max(vocab - 1, 15).bit_length()
    block, warps = min(width, 64 if INTERPRET else 8192), 8 if width >= 4096 else 4
    return {"BLOCK": block, "num_warps": warps, "maxnreg": 128, **FUSION}


def splits_of(vocab: int, tile: Tile) -> tuple[int, int]:
    """(splits, column tiles in each) of the vocabulary in the forward pass."""
    tiles = -(-vocab // tile.columns)
    per_split = max(MIN_PER_SPLIT, -(-tiles // MAX_SPLITS))
    return -(-tiles // per_split), per_split
