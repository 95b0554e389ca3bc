"""The pages: links lead somewhere, files that are named exist, and the page of flags is what the configs say."""

from __future__ import annotations

import ast
import dataclasses
import re
import runpy
import sys
import typing

import pytest
from loop_helpers import ROOT

from rto_fast.config import DistillConfig, DPOConfig, RLVRConfig, RMConfig, RTOConfig
from rto_fast.generate import GenerateConfig
from rto_fast.scoring.audit import AuditConfig

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:rto_fast|kernels|tests|bench|recipes|tools|docs)/[\w./-]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    for target in LINK.findall(text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, target
    for name in FILE.findall(text):
        assert (ROOT / name).exists() or "<" in name, f"{page.name}: {name}"


def test_a_module_says_in_one_line_what_it_is():
    for path in (ROOT / "rto_fast").rglob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert (text and len(text.splitlines()[0]) <= 80) or not path.read_text(), path


def test_readme_is_short_and_written_by_hand():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert "<!--" not in text  # the marks of generators


def test_the_page_of_flags_is_what_the_configs_say(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["flags_page.py", "--check"])
    runpy.run_path(str(ROOT / "tools" / "flags_page.py"), run_name="__main__")


def test_flags_beside_those_of_other_trainers_are_there():
    """Each flag of the first column, by its command's config; and those that were added last have a row."""
    configs = {"rto": RTOConfig, "dpo": DPOConfig, "rm": RMConfig, "distill": DistillConfig, "rlvr": RLVRConfig}
    configs |= {"audit": AuditConfig, "generate": GenerateConfig}
    rows = [r for r in (ROOT / "docs" / "from-other-trainers.md").read_text().splitlines() if r.startswith("| ")]
    named = set()
    for cell in (row.split(" | ")[0] for row in rows):
        command = re.search(r"rto-fast (\w+)", cell)
        fields = {f.name: f for f in dataclasses.fields(configs[command[1] if command else "rto"])}
        for flag, value in re.findall(r"--([a-z][\w-]*)(?: ([\w\\|-]+))?", cell):
            name = flag.replace("-", "_")
            assert name in fields, cell
            named.add(flag)
            choices = typing.get_args(typing.get_type_hints(RTOConfig).get(name))
            if value and choices and str in map(type, choices):
                assert set(value.replace("\\", "").split("|")) <= set(choices), cell
    assert len(named) > 60
    assert named >= {"label-smoothing", "nll-coef", "margin-weight", "min-response-length", "save-minutes", "ptx-coef"}
    assert named >= {"online", "online-order", "online-lr", "teacher", "scale", "base", "reward-fn", "dpo-clip", "run"}
    lora = ("rank", "alpha", "dropout", "targets", "rslora", "dora", "critic", "push", "lr")
    assert named >= {f"lora-{name}" for name in lora}


def test_the_page_of_memory_is_what_the_arithmetic_says(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["memory_page.py", "--check"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / "memory_page.py"), run_name="__main__")
    assert end.value.code == 0


def test_every_page_is_in_the_sites_navigation():
    named = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert named == {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}


def test_every_module_has_its_test_or_a_line_that_says_where():
    text = (ROOT / "tests" / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    modules, places = (
        {name for line in lines for name in re.findall(r"`([\w/.]+)`", line.split("|")[column])} for column in (1, 2)
    )
    assert all((ROOT / "tests" / place).exists() for place in places)
    assert all((ROOT / "rto_fast" / module).exists() for module in modules)
    tested = {p.stem.removeprefix("test_") for p in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "rto_fast").rglob("*.py"):
        name = str(path.relative_to(ROOT / "rto_fast"))
        assert path.stem in (*tested, "__init__") or name in modules, f"{name}: no test of its name, no line"
