"""Every tile choice of the vocabulary-sized kernels, in one place.

A choice depends on (H, V, dtype, chip), never on the number of tokens: that keeps a row's bits the same
whatever its batch. Measured choices live in a JSON file that outlives the process ($RTO_KERNELS_TILES, else
~/.cache/rto_kernels/tiles.json); `python -m rto_kernels.tune` writes it, and what it lacks is answered by the
defaults below.

An entry of that file names the kernels, the Triton and the GPU that it was measured with. With the same three it is
used as it is. With others its kernels are compiled and looked at first, once a process (tile_check.py); where they do
not fit the GPU or spill in their loops, the next entry is looked at, and after the last the defaults are used.
"""

import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
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
# The files of the kernels that tiles are for.
KERNEL_FILES = ("linear_forward.py", "linear_backward.py", "_math.py")


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


class Problem(NamedTuple):
    """What a choice of tiles depends on."""

    width: int  # H
    vocab: int  # V
    chip: str
    itemsize: int  # bytes of an operand
    descriptors: bool  # whether operands are read through tensor descriptors

    @property
    def key(self) -> str:
        operands = "tma" if self.descriptors else "pointers"
        return f"{self.chip} H{self.width} V{self.vocab} {8 * self.itemsize}bit {operands}"


@functools.cache
def kernels_version() -> str:
    """A digest of the kernels' sources."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in KERNEL_FILES)).hexdigest()[:8]


@functools.cache
def gpu_of(device: torch.device | None) -> str:
    """The device's name; "" off a GPU."""
    return torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else ""


def origin(device: torch.device | None) -> str:
    """What a choice is measured with, as entries name it."""
    return f"kernels {kernels_version()}, Triton {triton.__version__}, {gpu_of(device) or 'no GPU'}"


def _is_tile(x: object) -> bool:
    if not isinstance(x, list) or not 5 <= len(x) <= len(Tile._fields) or any(type(n) is not int for n in x):
        return False
    tile = Tile(*x)
    powers = all(n > 0 and n & (n - 1) == 0 for n in tile[:4])
    return powers and tile.stages > 0 and tile.parts in (1, 2) and 0 <= tile.registers <= 255


def allowed(choice: Tiles) -> bool:
    """Whether the kernels' shapes agree: rows of d(logits) are whole steps of the products over them."""
    return all(t.rows % choice.product.depth == 0 for t in choice[:-1])


def read_entries(path: Path) -> dict[str, Tiles]:
    """What the file holds, oldest first; {} where there is none. Raises ValueError for what tiles cannot look like."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(_malformed(path, str(error))) from None
    if not isinstance(found, dict):
        raise ValueError(_malformed(path, f"it holds a {type(found).__name__}, not an object of entries"))
    entries = {}
    for key, value in found.items():
        tiles = value if isinstance(value, list) else []
        if len(tiles) != len(Tiles._fields) or not all(map(_is_tile, tiles)):
            raise ValueError(_malformed(path, f"entry {key!r} is not {len(Tiles._fields)} tiles of positive integers"))
        entries[key] = Tiles(*(Tile(*t) for t in tiles))
        if not allowed(entries[key]):
            raise ValueError(_malformed(path, f"entry {key!r}: the product's depth does not divide the others' rows"))
    return entries


def _malformed(path: Path, why: str) -> str:
    return f"{path}, the file of measured tiles, cannot be read: {why}; delete it, or name another in RTO_KERNELS_TILES"


class Trial(NamedTuple):
    choice: Tiles
    chip: str | None


_trial: ContextVar[Trial | None] = ContextVar("trial", default=None)


@contextmanager
def trying(choice: Tiles, chip: str | None = None) -> Iterator[None]:
    """Inside, every problem is given these tiles, and with `chip` taken for that chip's."""
    token = _trial.set(Trial(choice, chip))
    try:
        yield
    finally:
        _trial.reset(token)


def problem_of(width: int, vocab: int, itemsize: int, device: torch.device) -> Problem:
    trial = _trial.get()
    chip = trial.chip if trial and trial.chip else chip_of(device)
    # The copy engine wants rows of whole 16 bytes; sm_80 has none.
    return Problem(width, vocab, chip, itemsize, chip != "sm80" and width * itemsize % 16 == 0)


def choose(problem: Problem, device: torch.device | None = None) -> Tiles:
    """The tiles for hidden [·, width] and weight [vocab, width] of `itemsize` bytes; on no device the defaults, or an
    entry that was measured on none."""
    if trial := _trial.get():
        return trial.choice
    if problem.chip == "cpu":
        return _INTERPRETED
    # The path is part of what is remembered, and costs a tenth of a millisecond to work out.
    return _chosen(problem, device, os.environ.get("RTO_KERNELS_TILES")) or _DEFAULTS[problem[2:]]


def measured(problem: Problem, device: torch.device) -> bool:
    """Whether an entry of the file of measured tiles is used for this problem on this device."""
    return _chosen(problem, device, os.environ.get("RTO_KERNELS_TILES")) is not None


@functools.cache
def _chosen(problem: Problem, device: torch.device | None, _: str | None) -> Tiles | None:
    """The entry that is used, None where none can be."""
    path = cache_path()
    entries = {k: t for k, t in read_entries(path).items() if k.split(", ")[0] == problem.key}
    same = entries.pop(f"{problem.key}, {origin(device)}", None)
    if same or not gpu_of(device):
        return same
    from .tile_check import objection_to  # whose kernels ask this file for their tiles

    return first_sound(entries, lambda choice: objection_to(choice, problem, device), path)


def first_sound(entries: dict[str, Tiles], objection: Callable[[Tiles], str], path: Path) -> Tiles | None:
    """The newest entry without an objection. One warning says what was left out and why."""
    refused = []
    for key, choice in reversed(entries.items()):
        why = objection(choice)
        if not why:
            break
        refused.append(f"{key!r}: {why}")
    else:
        choice = None
    if refused:
        instead = "the default tiles are used" if choice is None else "an older entry is used"
        warnings.warn(
            f"{path}: {'; '.join(refused)}; {instead}. `python -m rto_kernels.tune` measures new ones",
            RuntimeWarning,
            stacklevel=2,
        )
    return choice


def remember(problem: Problem, device: torch.device | None, tiles: Tiles) -> None:
    """Write a measured choice for later processes; this one keeps what it has, and so its results."""
    path = cache_path()
    known = read_entries(path)
    key = f"{problem.key}, {origin(device)}"
    known.pop(key, None)  # the newest stands last
    known[key] = tiles
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
