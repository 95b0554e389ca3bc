"""Imports go one way, read from the sources: rto_kernels <- rto_fast <- recipes; no cycle inside rto_fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "kernels" / "rto_kernels").glob("*.py"))
TRAINER = {p.stem: p for p in sorted((ROOT / "rto_fast").glob("*.py"))}


def imported(path: Path, *, top_level: bool = False) -> set[str]:
    """Absolute module names that a file imports; with top_level only those needed to import it."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return names


def packages(names: set[str]) -> set[str]:
    return {n.split(".")[0] for n in names}


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_kernels_need_torch_and_triton_alone(path):
    outside = packages(imported(path)) - set(sys.stdlib_module_names) - {"torch", "triton", "rto_kernels"}
    assert not outside, f"{path.name} imports {sorted(outside)}"


@pytest.mark.parametrize("path", TRAINER.values(), ids=lambda p: p.stem)
def test_the_trainer_knows_no_recipe_bench_or_test(path):
    assert not packages(imported(path)) & {"recipes", "bench", "tests"}


def test_no_cycles_in_the_trainer():
    """graphlib raises CycleError and names the cycle."""
    graph = {
        name: {n.split(".")[1] for n in imported(path, top_level=True) if n.startswith("rto_fast.")} & set(TRAINER)
        for name, path in TRAINER.items()
    }
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", ["config", "batch"])
def test_the_contract_imports_nothing_of_the_rest(name):
    assert "rto_fast" not in packages(imported(TRAINER[name]))


def test_only_the_loop_knows_the_loop():
    """Nothing that the loop is made of imports it: `trainer` is the top (the demo and recipes run it)."""
    users = {n for n, p in TRAINER.items() if "rto_fast.trainer" in imported(p)}
    assert users <= {"demo"}


SOFTMAX = {"softmax", "log_softmax", "logsumexp", "cross_entropy", "nll_loss", "logaddexp"}
DISTRIBUTIONS = {"decoding", "tabular"}
"""Sampling and tables of small token MDPs look at whole distributions."""


@pytest.mark.parametrize("path", [p for n, p in TRAINER.items() if n not in DISTRIBUTIONS], ids=lambda p: p.stem)
def test_log_probs_come_from_the_kernels_alone(path):
    called = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    assert not called & SOFTMAX


def test_kernels_is_a_plain_folder():
    """Hugging Face owns the package name `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_imports_from_the_repository_root():
    code = "import transformers.modeling_utils, rto_kernels; print(rto_kernels.__name__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["rto_kernels"]


def test_recipes_are_short():
    for path in (ROOT / "recipes").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path.name
