"""The two ceilings that every floor is counted from: copy bandwidth and the bf16 matrix product, on random data.

python -m bench.kernels.ceilings      writes run/ceilings of bench/results/<device>.json
"""

import statistics

import torch

from bench.harness import DEVICE, ON_GPU, RUN, clocks, save, seconds, source

ROUNDS = 20 if ON_GPU else 3
COPY_BYTES = 1 << (32 if ON_GPU else 22)
# The square product that cards are compared by, and the one of an LM head on 8192 tokens.
PRODUCTS = {"8192 × 8192 × 8192": (8192,) * 3, "8192 × 4096 × 128256": (8192, 4096, 128256)}
TOY_PRODUCTS = {"128 × 128 × 128": (128,) * 3}
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def timed(job) -> dict[str, float]:
    for _ in range(3):
        job()
    times = [seconds(job) for _ in range(ROUNDS)]
    return {"ms": statistics.median(times) * 1e3, "spread_ms": (max(times) - min(times)) * 1e3}


def copy() -> dict[str, float]:
    """Bytes read and written a second, between buffers far larger than any cache."""
    random = source()
    there = torch.randint(-(2**31), 2**31 - 1, (COPY_BYTES // 4,), dtype=torch.int32, **random)
    here = torch.empty_like(there)
    row = timed(lambda: here.copy_(there))
    return row | {"gb_per_s": 2 * COPY_BYTES / row["ms"] / 1e6}


def product(m: int, k: int, n: int) -> dict[str, float]:
    random = source()
    a, b = (torch.randn(size, **random).to(DTYPE) for size in ((m, k), (n, k)))
    out = torch.empty(m, n, dtype=DTYPE, device=DEVICE)
    row = timed(lambda: torch.mm(a, b.T, out=out))
    return row | {"tflops": 2 * m * k * n / row["ms"] / 1e9}


def main() -> None:
    before = clocks()
    copied = copy()
    products = {name: product(*shape) for name, shape in (PRODUCTS if ON_GPU else TOY_PRODUCTS).items()}
    record = {
        "copy_gb_per_s": copied["gb_per_s"],
        "matmul_tflops": max(row["tflops"] for row in products.values()),
        "copy": copied,
        "products": products,
        "rounds": ROUNDS,
        "clocks_before": before,
        "clocks_after": clocks(),
    }
    save(RUN, "ceilings", record)
    print(f"copy {record['copy_gb_per_s']:.0f} GB/s, product {record['matmul_tflops']:.1f} TFLOP/s")


if __name__ == "__main__":
    main()
