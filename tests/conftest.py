"""Fixtures that several test files share; nothing heavy is imported before a test asks for it."""

from __future__ import annotations

import gc
import os

import pytest
from launches import RENDEZVOUS, Launch
from loop_helpers import make_tiny_models

os.environ.setdefault("OMP_NUM_THREADS", "1")  # everything here is tiny; threads only wait for one another


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that workers end together: what is begun last is short.

    `make test` hands files out in this order (--no-loadscope-reorder), not those with the most tests first.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`loop_helpers.TinyModels`: tiny models and data, the same for the whole session; do not write into them."""
    return make_tiny_models(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def launch(tmp_path):
    """launch(args, ranks=1, timeout_s=300) -> Result; launch.start(args, ranks) -> a running Launch.

    `args` follow `python`: a recipe or script and its flags. Ranks that still run at the test's end are killed.
    """
    started: list[Launch] = []

    def start(args, ranks=1) -> Launch:
        log = tmp_path / f"launch{len(started)}.log"
        started.append(Launch(args, ranks=ranks, log=log))
        return started[-1]

    def run(args, ranks=1, timeout_s=300):
        return start(args, ranks).wait(timeout_s)

    run.start = start
    yield run
    for one in started:
        one.kill()


@pytest.fixture(scope="module")
def one_rank():
    """A process group of this process alone, and an environment that is afterwards what it was before."""
    before = {name: os.environ.get(name) for name in RENDEZVOUS}
    from rto_fast import distributed

    gc.freeze()  # the imported modules live for ever, and ZeRO-3 collects garbage for every engine
    yield distributed.init()
    gc.unfreeze()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
