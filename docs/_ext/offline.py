"""Fail the build if a page would load anything from a network. Links that a reader clicks are allowed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import SphinxError

LOADED = re.compile(
    r"<(?:script|img|iframe|source|link\b(?=[^>]*stylesheet))\b[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*\""
)
IMPORTED = re.compile(r"(?:@import|url\()\s*['\"]?(?:https?:)?//[^)\s]*")


def _check(app: Sphinx, error: Exception | None) -> None:
    found = [
        f"{path.relative_to(app.outdir)}: {match}"
        for pattern, files in ((LOADED, "*.html"), (IMPORTED, "*.css"))
        for path in Path(app.outdir).rglob(files)
        for match in pattern.findall(path.read_text(encoding="utf-8"))
    ]
    if found and error is None:
        raise SphinxError(
            "these pages load files from a network; put copies into docs/_static instead: " + "; ".join(found)
        )


def setup(app: Sphinx) -> dict[str, Any]:
    """Check the written pages at the end of the build."""
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
