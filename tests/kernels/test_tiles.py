"""Which tiles a device is given, and that they fit its shared memory."""

import pytest
import torch
from kernel_checks import selectable
from rto_kernels import tiles

KIB = 1024
# Shared memory that a block may use: A100 has 163 KiB, but consumer Ampere, Ada and Blackwell 99.
SHARED = {"sm80": 99 * KIB, "sm90": 227 * KIB, "sm100": 227 * KIB}


@pytest.mark.parametrize(
    ("capability", "chip"),
    [((8, 0), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((10, 0), "sm100"), ((10, 3), "sm100"), ((12, 0), "sm80")],
)
def test_consumer_chips_are_not_given_data_centre_tiles(monkeypatch, capability, chip):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tiles.chip_of.__wrapped__(torch.device("cuda", 0)) == chip


@pytest.mark.parametrize("chip", SHARED)
def test_the_operands_in_flight_fit_shared_memory(chip):
    for size in (2, 4):
        for _, choice in selectable(chip, size):
            for tile in choice:
                staged = tile.stages * (tile.rows + tile.columns) * tile.depth * size
                assert staged <= SHARED[chip], (chip, size, tile)
