"""Formulas as MathML, which browsers draw by themselves: no script, no network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from sphinx.writers.html5 import HTML5Translator


def _visit(display: str) -> Any:
    def visit(self: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
        try:
            self.body.append(convert(node.astext(), display=display))
        except Exception as error:
            raise SphinxError(f"{node.source}:{node.line}: no formula: {node.astext()!r}: {error!r}") from error
        raise nodes.SkipNode

    return visit


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer and choose it."""
    app.add_html_math_renderer("mathml", inline_renderers=(_visit("inline"), None), block_renderers=(_visit("block"), None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
