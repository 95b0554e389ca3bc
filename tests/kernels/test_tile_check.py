"""Measured tiles are used where their kernels fit the GPU and spill in no loop; else the next, else the defaults."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
import triton
from rto_kernels import _sass, aot, linear_forward, tile_check, tiles
from rto_kernels._dispatch import INTERPRET
from rto_kernels.tile_check import Compiled
from rto_kernels.tiles import Problem, Tile, Tiles

KIB = 1024
PROBLEM = Problem(4096, 128256, "sm90", 2, True)
DEFAULT = tiles._DEFAULTS["sm90", 2, True]
DEVICE = torch.device("cuda", 0)
FITS = Compiled("linear_stats", warps=8, registers=255, shared=200 * KIB, spills=0)
compiles = pytest.mark.skipif(INTERPRET, reason="interpreted kernels cannot be compiled")


def choice(columns: int) -> Tiles:
    """Tiles that are told apart by their columns."""
    return Tiles(*[Tile(128, columns, 64, 8, 3)] * 4)


def entry(choice: Tiles) -> list:
    return [list(t) for t in choice]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (FITS, ""),
        (FITS._replace(shared=227 * KIB), ""),
        (FITS._replace(shared=227 * KIB + 1), "linear_stats takes 232,449 bytes of shared memory, the GPU has 232,448"),
        (FITS._replace(warps=16), "linear_stats takes 130,560 registers, the GPU has 65,536"),
        (FITS._replace(spills=2), "linear_stats spills registers in its inner loop (2 loads and stores)"),
    ],
)
def test_what_is_refused(found, says):
    assert tile_check.objection(found, 227 * KIB) == says


SASS = """
        /*0100*/                   STL [R1], R2 ;
        /*0200*/                   LDGSTS.E [R4], [R6.64] ;
        /*0210*/                   {PRODUCT} R8, R4, R6, R8 ;
        /*0220*/                   {INSIDE} ;
        /*0230*/              @!P0 BRA 0x200 ;
        /*0240*/                   LDL R2, [R1] ;
        /*0250*/                   FADD R3, R3, R2 ;
        /*0260*/                   LDL R5, [R1+0x4] ;
        /*0270*/               @P1 BRA 0x240 ;
        /*0280*/               @P2 BRA 0x100 ;
"""


@pytest.mark.parametrize("product", ["HMMA.16816.F32.BF16", "HGMMA.64x256x16.F32.BF16", "UTCHMMA"])
@pytest.mark.parametrize(("inside", "count"), [("FADD R1, R1, R2", 0), ("LDL R2, [R1+0x8]", 1), ("STL [R1], R2", 1)])
def test_spills_count_inside_a_product_loop_alone(product, inside, count):
    """The loop of 0x240 multiplies nothing, and that of 0x100 has others inside."""
    assert _sass.spills_in_loops(SASS.replace("{PRODUCT}", product).replace("{INSIDE}", inside)) == count


def by_assembler(tile: Tile, chip: str = "sm90") -> Compiled:
    """What the forward pass over a small head says of itself with this tile."""
    held = tile_check.launches(Tiles(*[tile] * 4), Problem(64, 1024, chip, 2, chip != "sm80"))
    first = next(x for x in held if x.kernel is linear_forward.linear_stats_kernel)
    launch = aot._describe(first.kernel, chip, first.args, first.options)
    source = triton.compiler.ASTSource(
        launch.kernel, dict(launch.signature), constexprs=dict(launch.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )  # fmt: skip
    target = triton.backends.compiler.GPUTarget("cuda", aot.CHIPS[chip], 32)
    kernel = triton.compile(source, target=target, options=dict(launch.options))
    resources = _sass.dump(kernel.asm["cubin"], "--dump-resource-usage").split()
    numbers = {k: int(v) for k, v in (x.split(":") for x in resources if x.startswith(("REG:", "STACK:")))}
    return tile_check.described(launch.name, kernel, numbers["REG"], numbers["STACK"] // 4)


@compiles
def test_the_tiles_of_a_chip_pass_there_and_not_where_memory_is_less():
    found = by_assembler(DEFAULT.plain)
    assert tile_check.objection(found, 227 * KIB) == ""
    assert "shared memory" in tile_check.objection(found, 99 * KIB)


@compiles
def test_too_few_registers_spill_in_the_loop():
    found = by_assembler(Tile(128, 128, 32, 8, 3, registers=64), "sm80")
    assert found.spills > 0
    assert "spills registers" in tile_check.objection(found, 227 * KIB)


@pytest.mark.parametrize(("inside", "objects"), [("FADD R1, R1, R2", False), ("LDL R2, [R1+0x8]", True)])
def test_what_a_program_spills_outside_the_loop_is_no_objection(monkeypatch, inside, objects):
    sass = SASS.replace("{PRODUCT}", "HGMMA").replace("{INSIDE}", inside)
    monkeypatch.setattr(tile_check, "dump", lambda cubin, flag: sass)
    kernel = SimpleNamespace(asm={"cubin": b""}, metadata=SimpleNamespace(num_warps=8, shared=100 * KIB))
    found = tile_check.described("linear_stats_kernel", kernel, registers=168, spilled=3)
    assert bool(tile_check.objection(found, 227 * KIB)) == objects


@compiles
def test_every_product_that_an_update_launches_is_looked_at():
    names = {x.kernel.__name__.removesuffix("_kernel") for x in tile_check.launches(DEFAULT, PROBLEM)}
    assert names == {"linear_stats", "linear_dlogits", "linear_probabilities", "linear_product"}
    stats = [x.options for x in tile_check.launches(DEFAULT, PROBLEM) if x.kernel.__name__ == "linear_stats_kernel"]
    assert {(x["SAVE"], x["ENTROPY"]) for x in stats} >= {(save, on) for save in (0, 1, 2) for on in (False, True)}


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A GPU of our telling: `card(entries, {columns: numbers})`; `.asked` has the columns that were compiled for."""
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("RTO_KERNELS_TILES", str(path))
    monkeypatch.setattr(tiles, "gpu_of", lambda device: "A card")
    monkeypatch.setattr(tile_check, "shared_memory", lambda device: 227 * KIB)

    def put(entries: dict, numbers: dict) -> None:
        path.write_text(json.dumps(entries))

        def compiled(launch, device):
            put.asked.append(launch.options["BN"])
            return numbers[launch.options["BN"]]

        monkeypatch.setattr(tile_check, "compiled", compiled)

    put.asked = []
    yield put
    tiles._chosen.cache_clear()


def key(kernels: str, triton: str = "3.0.0") -> str:
    return f"{PROBLEM.key}, kernels {kernels}, Triton {triton}, A card"


def chosen() -> Tiles:
    return tiles.choose(PROBLEM, DEVICE)


def test_an_entry_of_another_version_is_looked_at_once_and_used(card):
    card({key("old"): entry(choice(64))}, {64: FITS})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == choice(64)
        looked = len(card.asked)
        assert looked > 5
        assert chosen() == choice(64)
    assert len(card.asked) == looked
    assert tiles.measured(PROBLEM, DEVICE)


def test_an_entry_of_this_version_and_card_is_used_as_it_is(card):
    mine = f"{PROBLEM.key}, {tiles.origin(DEVICE)}"
    card({mine: entry(choice(64)), key("newer"): entry(choice(128))}, {})
    assert chosen() == choice(64)
    assert not card.asked


def test_another_card_is_another_version(card):
    mine = f"{PROBLEM.key}, {tiles.origin(DEVICE)}"
    card({mine.replace("A card", "B card"): entry(choice(64))}, {64: FITS})
    assert chosen() == choice(64)
    assert set(card.asked) == {64}


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [(FITS._replace(shared=228 * KIB), "shared memory"), (FITS._replace(spills=4), "spills registers")],
)
def test_what_does_not_fit_gives_way_to_the_next_entry(card, numbers, reason):
    card({key("older"): entry(choice(32)), key("old"): entry(choice(64))}, {64: numbers, 32: FITS})
    with pytest.warns(RuntimeWarning, match=rf"kernels old.*{reason}.*an older entry is used") as said:
        assert [chosen(), chosen()] == [choice(32)] * 2
    assert len(said) == 1


def test_where_no_entry_fits_the_defaults_are_used(card):
    card(
        {key("older"): entry(choice(32)), key("old"): entry(choice(64))},
        dict.fromkeys((32, 64), FITS._replace(spills=1)),
    )
    with pytest.warns(RuntimeWarning, match="the default tiles are used") as said:
        assert chosen() == DEFAULT
    assert not tiles.measured(PROBLEM, DEVICE)
    assert len(said) == 1
    assert "kernels older" in str(said[0].message)


def test_what_does_not_compile_gives_way_too(card):
    card({key("old"): entry(choice(64))}, {})  # a KeyError where numbers are asked for
    with pytest.warns(RuntimeWarning, match="KeyError: 64; the default tiles are used"):
        assert chosen() == DEFAULT


def test_entries_of_other_problems_are_not_looked_at(card):
    card({key("old").replace("V128256", "V128257"): entry(choice(64))}, {})
    assert chosen() == DEFAULT
    assert not card.asked


GOOD = entry(choice(64))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{half a fi", "Expecting property name"),
        ("[]", "it holds a list"),
        (json.dumps({"k": 3}), "entry 'k' is not 4 tiles"),
        (json.dumps({"k": GOOD[:3]}), "entry 'k' is not 4 tiles"),
        (json.dumps({"k": [*GOOD[:3], [128, 64, 64]]}), "entry 'k' is not 4 tiles"),
        (json.dumps({"k": [*GOOD[:3], [128, 65, 64, 8, 3, 2, 255]]}), "entry 'k' is not 4 tiles"),
        (json.dumps({"k": [*GOOD[:3], [128, "64", 64, 8, 3, 2, 255]]}), "entry 'k' is not 4 tiles"),
        (json.dumps({"k": [*GOOD[:3], [128, 64, 256, 8, 3, 2, 255]]}), "the product's depth does not divide"),
        (b"\xff\xfe\x00", "decode"),
    ],
)
def test_a_malformed_file_is_one_clear_error(card, tmp_path, text, says):
    path = tmp_path / "tiles.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for call in (chosen, lambda: tiles.remember(PROBLEM, DEVICE, choice(64))):
        with pytest.raises(ValueError, match=r"tiles\.json, the file of measured tiles, cannot be read") as error:
            call()
        assert says in str(error.value)
        assert "delete it, or name another in RTO_KERNELS_TILES" in str(error.value)
        assert "\n" not in str(error.value)


def test_measured_tiles_outlive_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("RTO_KERNELS_TILES", str(tmp_path / "cache" / "tiles.json"))
    assert tiles.choose(PROBLEM) == DEFAULT
    tiles.remember(PROBLEM, None, choice(64))
    assert tiles.choose(PROBLEM) == DEFAULT  # this process keeps what it has
    tiles._chosen.cache_clear()
    assert tiles.choose(PROBLEM) == choice(64)
    assert tiles.choose(PROBLEM._replace(vocab=128257)) == DEFAULT
    tiles.remember(PROBLEM, None, choice(128))
    assert list(tiles.read_entries(tmp_path / "cache" / "tiles.json").values()) == [choice(128)]
    tiles._chosen.cache_clear()
