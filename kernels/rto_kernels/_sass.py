"""What the machine code of a compiled kernel shows: its inner loops, and what is spilled inside them."""

import os
import re
import subprocess
import tempfile
from typing import NamedTuple

import triton

# What multiplies matrices on sm_80, sm_90 and sm_100.
PRODUCT = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
SPILL = re.compile(r"\b(?:LDL|STL)\b")


class InnerLoop(NamedTuple):
    """What the machine code of a loop holds that has no other inside and multiplies matrices on Hopper."""

    products: int
    waits: int  # for products to end
    local: int  # loads and stores of spilled registers


def innermost(sass: str) -> list[list[str]]:
    """The instructions of each loop in `cuobjdump -sass` that has no other inside."""
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    loops = []
    for address, text in code:
        target = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [[text for address, text in code if first <= address <= last] for first, last in inner]


def inner_loops(sass: str) -> tuple[InnerLoop, ...]:
    """The loops over the inner dimension, of Hopper's products."""
    found = []
    for body in innermost(sass):
        products = sum("HGMMA" in text for text in body)
        if products:
            waits = sum("gsb0" in text for text in body)
            found.append(InnerLoop(products, waits, sum(bool(SPILL.search(text)) for text in body)))
    return tuple(found)


def spills_in_loops(sass: str) -> int:
    """Loads and stores of spilled registers inside the loops that multiply matrices."""
    bodies = [body for body in innermost(sass) if any(PRODUCT.search(text) for text in body)]
    return sum(bool(SPILL.search(text)) for body in bodies for text in body)


def dump(cubin: bytes, flag: str) -> str:
    """What `cuobjdump` of Triton's package prints of a cubin. Raises OSError where it is missing."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
