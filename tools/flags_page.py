"""Writes docs/flags.md: every flag of every command, its default and its meaning, read from the configs.

python tools/flags_page.py            writes the page
python tools/flags_page.py --check    fails where the page is not what it would write
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
from pathlib import Path
from typing import Any

from rto_fast import config
from rto_fast.config import FREE
from rto_fast.demo.config import ArithmeticConfig, DemoConfig

PAGE = Path(__file__).parents[1] / "docs" / "flags.md"
HEAD = """# All flags

`python tools/flags_page.py` writes this page from [`rto_fast/config/`](../rto_fast/config/__init__.py). A flag is its
field's name with dashes. `rto-fast COMMAND --help` lists the same with the command's own models and data sets, which
[`rto_fast/commands.py`](../rto_fast/commands.py) sets. A resumed run may change the flags that are marked *free*: they
change nothing that is learnt, or its rounding alone.
"""
SECTIONS = (
    ("Every stage", config.RunConfig),
    ("SFT, reward model and DPO", config.SupervisedConfig),
    ("Adapters: every stage that trains", config.LoraSettings),
    ("`rto-fast sft`", config.SFTConfig),
    ("Reward model and DPO", config.PreferenceConfig),
    ("`rto-fast rm`", config.RMConfig),
    ("`rto-fast dpo`", config.DPOConfig),
    ("`rto-fast rto`, `rto-fast ppo`", config.RTOSettings),
    ("`rto-fast ppo`, where it differs", config.PPOConfig),
    ("`rto-fast distill`, beside those", config.DistillConfig),
    ("`rto-fast rlvr`, where it differs", config.RLVRConfig),
    ("`rto-fast demo`", DemoConfig),
    ("`rto-fast arithmetic`", ArithmeticConfig),
)


def meanings(cls: type) -> dict[str, tuple[str, str]]:
    """{field: (type as it is written, docstring)} of the fields that a class itself defines."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for field, after in itertools.pairwise([*body, ast.Pass()]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            doc = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            found[field.target.id] = (ast.unparse(field.annotation), str(doc))
    return found


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "(none)"
    return "(empty)" if value == "" else str(value)


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def page() -> str:
    lines, known = [HEAD], {}
    for title, cls in SECTIONS:
        lines += [f"## {title}", "", cell(cls.__doc__ or ""), "", "| flag | default | meaning |", "|---|---|---|"]
        own = meanings(cls)
        known |= {name: doc for name, (_, doc) in own.items() if doc}
        for field in dataclasses.fields(cls):
            if field.name in own and field.init:
                kind, doc = own[field.name]
                choices = kind.removeprefix("Literal[").removesuffix("]") if kind.startswith("Literal[") else ""
                meaning = doc or known[field.name]
                meaning += f" One of {choices.replace(chr(39), '')}." if choices else ""
                free = " *free*" if field.metadata.get(FREE) else ""
                flag = "--" + field.name.replace("_", "-")
                lines.append(f"| `{flag}`{free} | `{cell(shown(field.default))}` | {cell(meaning)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() != page():
            sys.exit(f"{PAGE} is not what the configs say; run python tools/flags_page.py")
        return
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
