"""Render formulas as MathML, which browsers draw without a script or a network."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from sphinx.writers.html5 import HTML5Translator

FUNCTION = r"<mi>(?:log|exp|tanh)</mi>"
SPACE = '<mspace width="0.17em"/>'


def mathml(latex: str, display: str) -> str:
    """Return ``latex`` as a ``<math>`` element, with the thin spaces around functions that the converter omits."""
    text = convert(latex, display=display)
    text = re.sub(rf"(</(?:mi|mn|msub|mfrac|munder|munderover)>)({FUNCTION})", rf"\1{SPACE}\2", text)
    return re.sub(rf"({FUNCTION})(?!<mo stretchy=\"false\">|<mrow>)", rf"\1{SPACE}", text)


def _visit(display: str) -> Any:
    def visit(self: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
        try:
            self.body.append(mathml(node.astext(), display))
        except Exception as error:
            raise SphinxError(
                f"{node.source}:{node.line}: cannot convert the formula {node.astext()!r}: {error!r}"
            ) from error
        raise nodes.SkipNode

    return visit


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer and select it."""
    renderers = {"inline_renderers": (_visit("inline"), None), "block_renderers": (_visit("block"), None)}
    app.add_html_math_renderer("mathml", **renderers)
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
