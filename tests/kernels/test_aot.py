"""What ahead-of-time compilation promises: no spills in the loops that matter, wgmma and TMA on sm90. No GPU needed."""

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from kernel_checks import selectable
from launches import forks
from rto_kernels import aot, linear_forward
from rto_kernels._dispatch import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels cannot be compiled")


def heaviest(chip: str) -> list[aot.Launch]:
    """Of each kernel, tile and operand type, the launch with the most switched on: the first to spill.

    Launches with by-products stand beside those without, which every update makes.
    """

    def weight(launch):
        return sum(v is True for _, v in launch.constants), len(launch.aligned)

    best: dict[tuple, aot.Launch] = {}
    for launch in aot.launches(chip):
        tile = tuple((k, v) for k, v in launch.constants if k in ("BM", "BN", "BK", "TMA", "A_IS_KM", "PRECISION"))
        dtype = "16 bit" if launch.dtype in ("bf16", "fp16") else launch.dtype
        extras = any(v is True for k, v in launch.constants if k in ("MEAN", "TOP1", "SQUARES"))
        key = (launch.name, dtype, tile, extras)
        if key not in best or weight(launch) > weight(best[key]):
            best[key] = launch
    return list(best.values())


def verdict(chip: str, index: int) -> tuple[str, str]:
    proof = aot.prove(heaviest(chip)[index])
    return f"{proof.launch.name} {proof.launch.dtype} {proof.launch.variant}", proof.broken


@pytest.mark.parametrize("chip", aot.CHIPS)
def test_nothing_spills_and_hopper_is_used(chip):
    count = len(heaviest(chip))
    # Launches hold compiled functions that do not pickle: the workers find them again by their place.
    with ProcessPoolExecutor(2, mp_context=forks()) as pool:
        verdicts = list(pool.map(verdict, [chip] * count, range(count), chunksize=4))
    assert not [v for v in verdicts if v[1]]
    names = {v[0].split()[0] for v in verdicts}
    assert {
        "linear_stats",
        "linear_dlogits",
        "linear_probabilities",
        "linear_factor",
        "linear_product",
        "linear_block",
        "linear_extras",
        "logits_logprob",
        "logits_token_rewards",
    } <= names
    assert {"token_rewards", "gae", "ppo_loss"} <= names


def test_every_selectable_tile_is_launched():
    for chip in aot.CHIPS:
        seen = {
            tuple(dict(launch.constants)[k] for k in ("BM", "BN", "BK", "TMA"))
            for launch in aot.launches(chip)
            if launch.is_product
        }
        for size in (2, 4):
            for descriptors, choice in selectable(chip, size):
                wanted = {(*tile[:3], descriptors) for tile in choice}
                assert wanted <= seen


def test_launches_follow_the_shapes():
    found = {(x.name, x.descriptors, x.dtype) for x in aot.launches("sm90") if x.is_product}
    for dtype in ("bf16", "fp16", "fp32"):
        assert {("linear_stats", d, dtype) for d in (True, False)} <= found
    assert not any(x.descriptors for x in aot.launches("sm80"))
    whole, odd = (torch.empty(2, h, dtype=torch.bfloat16) for h in (64, 257))
    assert linear_forward.tiles_of(whole, 100)[0]
    assert not linear_forward.tiles_of(odd, 100)[0]
    precisions = {dict(x.constants)["PRECISION"] for x in aot.launches("sm90") if x.is_product and x.dtype == "fp32"}
    assert precisions == {"tf32x3"}
