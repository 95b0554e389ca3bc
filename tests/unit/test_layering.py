"""Imports go one way, read from the sources: rto_kernels <- rto_fast <- recipes, and down inside rto_fast."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from loop_helpers import ROOT

KERNELS = sorted((ROOT / "kernels" / "rto_kernels").glob("*.py"))
TRAINER = ROOT / "rto_fast"
FILES = sorted(TRAINER.rglob("*.py"))

ORDER = (
    ("__main__",),
    ("commands",),
    ("demo", "generate", "export"),
    ("trainer",),
    ("metrics",),
    ("build", "updates"),
    ("run",),
    ("supervised", "rollout", "scoring"),
    ("memory",),
    ("backend",),
    ("models", "report"),
    ("data", "logs", "algo", "cli"),
    ("config",),
    ("errors", "distributed", "contract", "redact"),
)
"""Rooms of rto_fast (a folder, or a file beside them), those on top first: a room imports from those below it alone."""


def imported(path: Path) -> set[str]:
    """Absolute module names that a file imports, inside functions too; of `from a import b` also a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return names


def packages(names: set[str]) -> set[str]:
    return {n.split(".")[0] for n in names}


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(("rto_fast", *parts)).removesuffix(".__init__")


def import_graph(root: Path) -> dict[str, set[str]]:
    """Each module of a copy of rto_fast -> the modules of rto_fast that it imports."""
    paths = {module_of(p, root): p for p in root.rglob("*.py")}
    return {name: imported(path) & (set(paths) - {name}) for name, path in paths.items()}


def room_of(module: str) -> str:
    """The folder under rto_fast that holds a module, or the file's own name."""
    return module.split(".")[1]


def climbing(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a module in a higher room, or in another room of the same height."""
    height = {room: -i for i, rooms in enumerate(ORDER) for room in rooms}
    return sorted(
        f"{name} -> {other}"
        for name, others in graph.items()
        for other in others - {"rto_fast"}
        if name == "rto_fast" or (room_of(name) != room_of(other) and height[room_of(other)] >= height[room_of(name)])
    )


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_kernels_need_torch_and_triton_alone(path):
    outside = packages(imported(path)) - set(sys.stdlib_module_names) - {"torch", "triton", "rto_kernels"}
    assert not outside, f"{path.name} imports {sorted(outside)}"


def test_the_trainer_knows_no_recipe_bench_or_test():
    for path in FILES:
        assert not packages(imported(path)) & {"recipes", "bench", "tests"}, path


def test_the_trainer_imports_by_full_names():
    """Else the tests below would not see an import."""
    for path in FILES:
        relative = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level]
        assert not relative, path


def test_imports_go_down():
    assert climbing(import_graph(TRAINER)) == []


def test_no_circle_of_imports():
    """graphlib raises CycleError and names the cycle; imports inside functions count."""
    list(TopologicalSorter(import_graph(TRAINER)).static_order())


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize(
    ("low", "high"), [("config.base", "trainer"), ("distributed", "demo.pipeline"), ("errors", "config.base")]
)
def test_a_planted_import_is_found(tmp_path, low, high, lazily):
    """An import that climbs fails the two tests above, at the top of a file and inside a function."""
    root = tmp_path / "rto_fast"
    shutil.copytree(TRAINER, root, ignore=shutil.ignore_patterns("__pycache__"))
    line = f"import rto_fast.{high}"
    with (root / f"{low.replace('.', '/')}.py").open("a") as file:
        file.write(f"\n\ndef planted():\n    {line}\n" if lazily else f"\n\n{line}\n")
    assert climbing(import_graph(root)) == [f"rto_fast.{low} -> rto_fast.{high}"]
    with pytest.raises(CycleError):
        list(TopologicalSorter(import_graph(root)).static_order())


def test_every_file_has_its_room():
    rooms = [room for rung in ORDER for room in rung]
    assert {room_of(module_of(p, TRAINER)) for p in FILES if p.parent != TRAINER or p.stem != "__init__"} <= set(rooms)


def test_no_name_that_hides_another():
    """A script's own folder comes first on its path: these would stand in for Python's, vLLM's and Hugging Face's."""
    names = {p.stem if p.stem != "__init__" else p.parent.name for p in FILES}
    assert not names & {"types", "vllm", "kernels"}


@pytest.mark.parametrize("name", ["errors", "contract"])
def test_the_bottom_imports_nothing_of_the_rest(name):
    assert "rto_fast" not in packages(imported(TRAINER / f"{name}.py"))


def test_only_the_demo_runs_the_loop():
    """Nothing that the loop is made of imports it: `trainer` is the top (the demo and recipes run it)."""
    users = {room_of(n) for n, others in import_graph(TRAINER).items() if "rto_fast.trainer" in others}
    assert users <= {"demo"}


SOFTMAX = {"softmax", "log_softmax", "logsumexp", "cross_entropy", "nll_loss", "logaddexp"}
DISTRIBUTIONS = {"decoding", "attention", "family"}
"""Sampling and the check of families look at whole distributions; attention has a softmax of its own."""


def test_log_probs_come_from_the_kernels_alone():
    for path in (p for p in FILES if p.stem not in DISTRIBUTIONS):
        called = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        assert not called & SOFTMAX, path


@pytest.mark.parametrize("folder", [ROOT, ROOT / "bench"], ids=lambda p: p.name)
def test_kernels_is_a_plain_folder(folder):
    """Hugging Face owns the package name `kernels`."""
    assert not (folder / "kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_transformers_imports_beside_folders_of_kernels():
    """As in `python bench/gpu.py`, whose own folder comes first on the path, and from the root, which comes next."""
    code = f"import sys; sys.path.insert(1, {str(ROOT)!r}); import transformers.modeling_utils, rto_kernels; "
    code += "print(rto_kernels.__name__)"
    folder = ROOT / "bench"
    out = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=180)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["rto_kernels"]


def test_recipes_are_short():
    for path in (ROOT / "recipes").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path.name
