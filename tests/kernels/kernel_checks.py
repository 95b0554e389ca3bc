"""What the kernel tests share: backends, ragged layouts with NaN in the padding, the accuracy contract."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st
from rto_kernels import tiles
from rto_kernels._dispatch import INTERPRET

TRITON = INTERPRET or torch.cuda.is_available()
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
BACKENDS = [
    pytest.param("torch", marks=pytest.mark.skipif(INTERPRET, reason="runs without TRITON_INTERPRET")),
    pytest.param("triton", marks=pytest.mark.skipif(not TRITON, reason="needs TRITON_INTERPRET=1 or a CUDA GPU")),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def selectable(chip: str, itemsize: int) -> list[tuple[bool, tiles.Tiles]]:
    """Every (descriptors, tiles) that a launch on `chip` can be given."""
    return [(tma, t) for (c, size, tma), t in tiles._DEFAULTS.items() if c == chip and size == itemsize]


@dataclass
class Layout:
    """A ragged batch. `rows`: a sequence's positions in the flattened tokens; `inside`: those masked in."""

    shape: tuple[int, ...]
    rows: list[list[int]]
    inside: list[list[int]]
    cu_seqlens: torch.Tensor | None
    mask: torch.Tensor | None
    seed: int

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def kw(self) -> dict:
        return {"cu_seqlens": self.cu_seqlens, "mask": self.mask}

    def tokens(self, dtype=torch.float32, scale=1.0) -> torch.Tensor:
        """Random numbers inside the mask, NaN outside it."""
        x = (torch.randn(self.shape, generator=self.generator) * scale).to(dtype).to(DEVICE)
        return x if self.mask is None else x.masked_fill(self.mask == 0, float("nan"))

    def sequences(self, dtype=torch.float32, scale=1.0) -> torch.Tensor:
        return (torch.randn(self.batch, generator=self.generator) * scale).to(dtype).to(DEVICE)

    def outside_is_zero(self, *outs: torch.Tensor) -> bool:
        return self.mask is None or all(bool((out[self.mask == 0] == 0).all()) for out in outs)


def build(kind: str, lengths: list[int], width: int, seed: int, index_dtype=torch.int32) -> Layout:
    """kind: "packed", "packed_masked", "full", "left", "right", "gaps" (padded, any token may be out)."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    cu_seqlens = mask = None
    if kind.startswith("packed"):
        ends = [sum(lengths[:i]) for i in range(batch + 1)]
        shape = (ends[-1],)
        rows = [list(range(a, b)) for a, b in pairwise(ends)]
        cu_seqlens = torch.tensor(ends, dtype=index_dtype)
    else:
        shape = (batch, width)
        rows = [list(range(b * width, (b + 1) * width)) for b in range(batch)]
    if kind in ("gaps", "packed_masked"):
        mask = torch.rand(shape, generator=generator) > 0.4
        if kind == "gaps":  # and for every other sequence a gap that swallows whole blocks
            mask[::2, width // 5 : 4 * width // 5] = False
    elif kind in ("left", "right"):
        column = torch.arange(width).expand(batch, width)
        count = torch.tensor([min(n, width) for n in lengths]).reshape(batch, 1)
        mask = column >= width - count if kind == "left" else column < count
    flat = [True] * sum(map(len, rows)) if mask is None else mask.reshape(-1).tolist()
    inside = [[i for i in row if flat[i]] for row in rows]
    on = [None if x is None else x.to(DEVICE) for x in (cu_seqlens, mask)]
    return Layout(shape, rows, inside, *on, seed)


@st.composite
def layouts(draw) -> Layout:
    kind = draw(st.sampled_from(["packed", "packed_masked", "full", "left", "right", "gaps"]))
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 15, 16, 17, 31, 40]), max_size=5))
    width = draw(st.sampled_from([0, 1, 2, 7, 16, 17, 41, 70]))
    index_dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return build(kind, lengths, width, draw(st.integers(0, 2**16)), index_dtype)


KINDS = ("packed", "packed_masked", "full", "left", "right", "gaps")


def sample(kind: str, seed: int = 0) -> Layout:
    """One layout of each kind, with an empty sequence, a one-token one, and more than one block of tokens."""
    return build(kind, [17, 0, 1, 33, 5], 37, seed)


def check_error(name: str, out, truth, same, scale=1.0) -> None:
    """|out − truth| ≤ 1.1·|same − truth| + 4·eps(out.dtype)·max(1, |truth|max, scale); same: PyTorch's."""
    truth = torch.as_tensor(truth, dtype=torch.float64).cpu()
    out_, same_ = out.detach().cpu().double(), torch.as_tensor(same).detach().cpu().double()
    assert out_.shape == truth.shape, f"{name}: shape {list(out_.shape)}, expected {list(truth.shape)}"
    if truth.numel() == 0:
        return
    assert out_.isfinite().all(), f"{name}: not finite"
    size = max(1.0, float(truth.abs().max()), float(scale))
    bound = 1.1 * float((same_ - truth).abs().max()) + 4 * torch.finfo(out.dtype).eps * size
    error = float((out_ - truth).abs().max())
    assert error <= bound, f"{name}: error {error:.3g} above {bound:.3g}"


def largest(*tensors) -> float:
    """The largest finite magnitude in the inputs."""
    return max(
        (float(t.detach().nan_to_num(0).abs().max()) for t in tensors if t is not None and t.numel()),
        default=0.0,
    )


def bits(*tensors: torch.Tensor) -> list[bytes]:
    return [t.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for t in tensors if t.numel()]
