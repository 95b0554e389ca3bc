"""The tuner climbs to the fastest tiles, believes no wrong result, and what it finds is used by later processes."""

import pytest
import torch
from rto_kernels import tiles, tune
from rto_kernels._dispatch import INTERPRET
from rto_kernels.tiles import Problem, Tile, Tiles

needs_triton = pytest.mark.skipif(
    not INTERPRET and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a CUDA GPU"
)
DEVICE = "cpu" if INTERPRET else "cuda"
CPU = Problem(64, 90, "cpu", 4, True)
START = Tiles(*[Tile(16, 32, 32, 4, 1)] * 3, Tile(16, 32, 16, 4, 1))


def problem():
    random = {"generator": torch.Generator(DEVICE).manual_seed(0), "device": DEVICE}
    hidden, weight = torch.randn(20, 64, **random), torch.randn(90, 64, **random)
    return hidden, weight, torch.randint(90, (20,), **random)


def test_neighbours_differ_in_one_field_by_one_step():
    found = set(tune.neighbours(START.plain))
    assert START.plain._replace(rows=64) in found
    assert START.plain._replace(columns=64) in found
    assert START.plain._replace(stages=2) in found
    assert all(sum(a != b for a, b in zip(t, START.plain, strict=True)) == 1 for t in found)
    assert all(t.warps in (4, 8) and t.rows in (16, 64) for t in found)


def test_shapes_that_do_not_agree_are_not_tried():
    assert tune.allowed(START)
    assert not tune.allowed(START._replace(product=START.product._replace(depth=32)))


@needs_triton
def test_it_climbs_to_the_fastest():
    """By a clock that likes columns of 64 and depths of 16, and nothing else."""

    def clock(job, device):
        job()
        choice = tiles.choose(CPU)
        return sum(10.0 - 2 * (t.columns == 64) - (t.depth == 16) for t in choice)

    said = []
    with tiles.trying(START):
        best = tune.tune(*problem(), measure=clock, say=said.append)
    assert [(t.columns, t.depth) for t in best] == [(64, 16)] * 4
    assert not any("left out" in line for line in said), said
    assert (
        tiles.choose(CPU._replace(chip="sm90", descriptors=True)) == tiles._DEFAULTS["sm90", 4, True]
    )  # the trials are over


@needs_triton
def test_wrong_and_failing_tiles_are_left_out(monkeypatch):
    """All are faster than the start, by this clock; those of 64 columns are wrong, those of 2 stages fail."""
    honest, said = tune.linear_forward_triton, []

    def forward(*args):
        tile = tiles.choose(CPU).plain
        if tile.stages == 2:
            raise RuntimeError("out of shared memory")
        out = honest(*args)
        return out._replace(logp=out.logp * 1.01) if tile.columns == 64 else out

    monkeypatch.setattr(tune, "linear_forward_triton", forward)
    with tiles.trying(START):
        best = tune.tune(*problem(), measure=lambda *_: float(tiles.choose(CPU) == START), say=said.append)
    assert best.plain.columns != 64
    assert best.plain.stages != 2
    assert best != START
    assert any("differs by 1.0e-02" in line for line in said)
    assert any("RuntimeError" in line for line in said)


@needs_triton
def test_without_minutes_nothing_is_tried():
    said = []
    with tiles.trying(START):
        assert tune.tune(*problem(), minutes=0.0, say=said.append) == START
    assert said[-1] == "0 minutes are over; the best so far stands"


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1, where the command runs without a GPU")
def test_the_command_writes_what_it_found(monkeypatch, tmp_path, capsys):
    found = START._replace(plain=START.plain._replace(depth=16))
    monkeypatch.setenv("RTO_KERNELS_TILES", str(tmp_path / "tiles.json"))
    monkeypatch.setattr(tune, "tune", lambda *args, **settings: found)
    command = ["tune", "--hidden", "64", "--vocab", "90", "--dtype", "float32", "--tokens", "8"]
    monkeypatch.setattr("sys.argv", [*command, "--dry-run"])
    tune.main()
    assert not (tmp_path / "tiles.json").exists()
    monkeypatch.setattr("sys.argv", command)
    tune.main()
    assert "depth=16" in capsys.readouterr().out
    assert tiles.read_entries(tmp_path / "tiles.json") == {f"{CPU.key}, {tiles.origin(None)}": found}
