"""Every function, class and method of the packages is called by something that is no test.

Read from the sources, without running them: a top-level name counts as used where its module uses it outside of its
own definition, another file imports it, or reaches it through its module; a method or a field where its name stands
anywhere else. So nothing is reported that is used, and what shares its name with another thing may be missed.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from loop_helpers import ROOT

PACKAGES = {"rto_fast": ROOT, "rto_kernels": ROOT / "kernels"}
CALLERS = ("rto_fast", "kernels/rto_kernels", "recipes", "tools", "bench")
"""Where a call counts."""
OUTSIDE = {
    "rto_fast.__getattr__": "Python",
    "rto_fast.rollout.decoding.FixedLayer.get_seq_length": "transformers' caches",
    "rto_fast.rollout.vllm_engines.worker_extension.WeightReceiver": "vLLM, by the name in EXTENSION",
}
"""What others call, and who."""
DOCS = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def sources() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for folder in CALLERS for path in sorted((ROOT / folder).rglob("*.py"))}


def module_of(path: Path) -> str:
    """Dotted name of a file below a package's folder, else its own name."""
    for package, root in PACKAGES.items():
        if path.is_relative_to(root / package):
            parts = path.relative_to(root).with_suffix("").parts
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return path.stem


def names_in(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) of every use: loads, attributes, words of short strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 120:
            yield from ((word, node.lineno) for word in re.findall(r"[A-Za-z_]\w*", node.value))


def imported(trees: dict[Path, ast.Module]) -> set[str]:
    """module.name of what files import from modules or reach through them; and of modules themselves."""
    found: set[str] = set()
    for path, tree in trees.items():
        aliases: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                source = node.module or ""
                if node.level:
                    depth = node.level - (path.name == "__init__.py")
                    above = module_of(path).split(".")[: -depth or None]
                    source = ".".join([*above, *filter(None, [source])])
                for name in node.names:
                    found.add(f"{source}.{name.name}")
                    aliases[name.asname or name.name] = f"{source}.{name.name}"
            elif isinstance(node, ast.Import):
                aliases |= {n.asname or n.name: n.name for n in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (module := aliases.get(ast.unparse(node.value))):
                found.add(f"{module}.{node.attr}")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # "module:function"
                found.update(f"{m}.{f}" for m, f in re.findall(r"\b([a-z_.]+):([a-z_]\w*)", node.value))
    return found


def unused(trees: dict[Path, ast.Module]) -> list[str]:
    """Dotted names of definitions in the packages that nothing uses."""
    reached, uses = imported(trees), {path: list(names_in(tree)) for path, tree in trees.items()}
    where: dict[str, list[tuple[Path, int]]] = defaultdict(list)
    for path, found in uses.items():
        for name, line in found:
            where[name].append((path, line))

    def used_here(node: Definition, path: Path) -> bool:
        return any(p == path and not node.lineno <= line <= node.end_lineno for p, line in where[node.name])

    dead = []
    for path, tree in trees.items():
        module = module_of(path)
        if module.split(".")[0] not in PACKAGES:
            continue
        for node in tree.body:
            if not isinstance(node, Definition) or node.name == "_":  # an operator's fake implementation
                continue
            if not used_here(node, path) and f"{module}.{node.name}" not in reached:
                dead.append(f"{module}.{node.name}")
            if isinstance(node, ast.ClassDef):
                dead += [f"{module}.{node.name}.{name}" for name in _unused_members(node, path, where)]
    return dead


def _unused_members(kind: ast.ClassDef, path: Path, where: dict[str, list[tuple[Path, int]]]) -> Iterator[str]:
    """Methods, and fields of rto_fast's classes, whose names stand nowhere else; a call of the class names no field."""
    for node in kind.body:
        if isinstance(node, Definition):
            name = "" if node.name.startswith("__") else node.name
        else:
            name = _field(node) if path.is_relative_to(ROOT / "rto_fast") else ""
        if name and all(p == path and node.lineno <= line <= node.end_lineno for p, line in where[name]):
            yield name


def _field(node: ast.stmt) -> str:
    return node.target.id if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else ""


def test_no_code_is_called_by_tests_alone():
    """The kernels are a package for others too: what docs name there needs no caller here."""
    named = set(re.findall(r"[A-Za-z_]\w*", " ".join(path.read_text() for path in DOCS)))
    dead = [name for name in unused(sources()) if name not in OUTSIDE]
    assert [n for n in dead if not (n.startswith("rto_kernels.") and n.rpartition(".")[2] in named)] == []


def test_every_exception_is_still_needed():
    assert set(OUTSIDE) <= set(unused(sources()))


def test_dead_code_is_found():
    path, other = ROOT / "rto_fast" / "one.py", ROOT / "rto_fast" / "two.py"
    first = """
def a(): return b()
def b(): pass
def c(): return c()
class D:
    g: int
    h: int
    def e(self): return self.f() + self.g
    def f(self): pass
"""
    second = "from rto_fast import one\nfrom rto_fast.one import D\none.a(), D(g=1, h=2)\n"
    trees = {path: ast.parse(first), other: ast.parse(second)}
    assert unused(trees) == ["rto_fast.one.c", "rto_fast.one.D.h", "rto_fast.one.D.e"]
