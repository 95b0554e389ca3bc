"""What mkdocs cannot do by itself: pages that show pictures and name files outside docs/.

Pages are written so that their links work where they are read most, in the repository. For the site, pictures of
bench/results go along with it, and a link to any other file of the repository becomes its name. Such a link to a file
that is not there is an error.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PICTURES = ("*.svg", "*.png")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    for pattern in PICTURES:
        for path in sorted((ROOT / "bench" / "results").rglob(pattern)):
            files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    place = (ROOT / "docs" / page.file.src_uri).parent

    def replaced(match: re.Match[str]) -> str:
        picture, text, target, anchor = match.groups()
        path = Path(os.path.normpath(place / target))
        if path.is_relative_to(ROOT / "docs"):
            return match[0]
        if not path.exists():
            raise PluginError(f"{page.file.src_uri}: {target} does not exist")
        if picture:
            inside = os.path.relpath(ROOT / "docs" / path.relative_to(ROOT), place)
            return f"![{text}]({inside}{anchor or ''})"
        return text

    return LINK.sub(replaced, markdown.replace("<details>", '<details markdown="1">'))
