"""What the kernel benchmarks share: pytest-benchmark times ours again after the comparison."""

import os
import time
from pathlib import Path

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


def _done() -> list[str]:
    """Names of the cases that an earlier command of gpu.py has measured."""
    path = Path(os.environ.get("RTO_BENCH_DONE", os.devnull))
    return path.read_text().split("\n") if path.is_file() else []


def pytest_collection_modifyitems(config, items):
    """A large shape on a CPU takes as long as it takes; the tests' limit is not for it."""
    for item in items:
        item.add_marker(pytest.mark.timeout(0))
    done = set(_done())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logreport(report):
    """Note a case that was measured, for the command that goes on."""
    if report.when == "call" and report.passed and "RTO_BENCH_DONE" in os.environ:
        with Path(os.environ["RTO_BENCH_DONE"]).open("a") as out:
            out.write(f"{report.nodeid}\n")


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and _done():
        session.exitstatus = pytest.ExitCode.OK


def pytest_runtest_setup(item):
    """gpu.py gives its minutes; what does not fit is left out whole, and said so."""
    if time.time() > float(os.environ.get("RTO_BENCH_DEADLINE", "inf")):
        pytest.skip("not run: no minutes left")
