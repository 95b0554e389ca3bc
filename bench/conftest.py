"""What the kernel benchmarks share: pytest-benchmark times ours again after the comparison."""

import os
import time

import pytest

from bench.harness import ROUNDS


@pytest.fixture
def once(benchmark):
    """Lets pytest-benchmark time ours too, in a few rounds of its own, after the comparison."""

    def run(contender, record: dict):
        if not ROUNDS:
            return
        row = record["contenders"]["ours"]
        benchmark.extra_info.update({k: v for k, v in row.items() if k != "failed"})
        benchmark.pedantic(contender, rounds=min(3, ROUNDS), iterations=1, warmup_rounds=ROUNDS > 1)

    return run


def pytest_collection_modifyitems(items):
    """A large shape on a CPU takes as long as it takes; the tests' limit is not for it."""
    for item in items:
        item.add_marker(pytest.mark.timeout(0))


def pytest_runtest_setup(item):
    """gpu.py gives its minutes; what does not fit is left out whole, and said so."""
    if time.time() > float(os.environ.get("RTO_BENCH_DEADLINE", "inf")):
        pytest.skip("not run: no minutes left")
