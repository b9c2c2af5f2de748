"""Rewrite links of Markdown files so that links which work in the repository also work on the site.

A page links to ``../benchmarks/README.md``, and an included README links to files in its own folder. If the site has
the target as a page, the link leads to that page. Any other file is offered as a copy. A link to a folder becomes plain
text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
INCLUDE = re.compile(r"^```\{include\} (\S+)", re.MULTILINE)


def included_pages(docs: Path) -> dict[Path, Path]:
    """Map each included file of the repository to the page of the site that includes it."""
    return {
        (page.parent / target).resolve(): page
        for page in docs.glob("*.md")
        for target in INCLUDE.findall(page.read_text(encoding="utf-8"))
    }


def rewrite(text: str, *, folder: Path, docs: Path, pages: dict[Path, Path]) -> str:
    """Return ``text`` of a file in ``folder`` with its links rewritten for a page in ``docs``."""

    def replace(match: re.Match[str]) -> str:
        image, label, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = (folder / target).resolve()
        if path.is_dir():
            return label
        relative = Path(os.path.relpath(pages.get(path, path), docs)).as_posix()
        return f"{image}[{label}]({relative}{anchor if relative.endswith('.md') else ''})"

    return LINK.sub(replace, text)


def _page(app: Sphinx, docname: str, source: list[str]) -> None:
    docs = Path(app.srcdir)
    source[0] = rewrite(source[0], folder=(docs / docname).parent, docs=docs, pages=included_pages(docs))


def _included(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    docs = Path(app.srcdir)
    content[0] = rewrite(content[0], folder=(docs / path).resolve().parent, docs=docs, pages=included_pages(docs))


def setup(app: Sphinx) -> dict[str, Any]:
    """Rewrite the links of pages and included files when Sphinx reads them."""
    app.connect("source-read", _page)
    app.connect("include-read", _included)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
