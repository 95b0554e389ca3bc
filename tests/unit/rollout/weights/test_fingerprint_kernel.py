"""The checksum's kernel: the digests of plain torch, bit for bit, and code for the GPUs that vLLM runs on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rto_fast.rollout.weights.fingerprint_kernel import BLOCK, LOOPS, checksum

INTERPRETED = """
import torch
from rto_fast.rollout.weights import fingerprint as plain
from rto_fast.rollout.weights.fingerprint_kernel import BLOCK, LOOPS, add_checksum

generator = torch.Generator().manual_seed(0)
program = BLOCK * LOOPS
for dtype, bits in ((torch.uint8, 8), (torch.int16, 16), (torch.int32, 32), (torch.int64, 63)):
    for size in (0, 1, 7, BLOCK - 1, program, program + 1, 3 * program - 5):
        low, high = (0, 255) if dtype == torch.uint8 else (-(1 << (bits - 1)), 1 << (bits - 1))
        words = torch.randint(low, high, (size,), generator=generator, dtype=torch.int64).to(dtype)
        before = int(torch.randint(0, 1 << 62, (), generator=generator))
        ours, theirs = torch.tensor(before), torch.tensor(before)
        add_checksum(words, ours)
        plain._add_checksum(words, theirs)
        assert ours == theirs, (dtype, size, ours, theirs)
        assert size == 0 or ours != before
print("equal")
"""


def test_digests_are_those_of_plain_torch():
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout == "equal\n", result.stderr


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("words", ["*u8", "*i16", "*i32", "*i64"])
def test_it_compiles_and_spills_nothing(chip, words):
    signature = {"words_ptr": words, "total_ptr": "*i64", "count": "i64", "BLOCK": "constexpr", "LOOPS": "constexpr"}
    source = ASTSource(checksum, signature, constexprs={"BLOCK": BLOCK, "LOOPS": LOOPS})
    code = triton.compile(source, target=GPUTarget("cuda", chip, 32))
    assert "atom" in code.asm["ptx"]
    assert ".local" not in code.asm["ptx"]
