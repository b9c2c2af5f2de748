"""List the pages that index.md does not name after those that it names, so that no page is missing from the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _index(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname != "index":
        return
    entries = (line.strip() for body in TOCTREE.findall(source[0]) for line in body.splitlines())
    named = {entry.rpartition("<")[2].rstrip(">") for entry in entries}
    others = sorted(page.stem for page in Path(app.srcdir).glob("*.md") if page.stem not in named | {"index"})
    if others:
        source[0] += "\n```{toctree}\n:caption: More\n:hidden:\n\n" + "\n".join(others) + "\n```\n"


def setup(app: Sphinx) -> dict[str, Any]:
    """Complete the table of contents when Sphinx reads index.md."""
    app.connect("source-read", _index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
