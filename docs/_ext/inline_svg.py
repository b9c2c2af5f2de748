"""Put SVG figures into the page itself, so that they take its colours, dark or light, and need no separate file.

A figure draws in ``currentColor``. Its own ``<style>`` is meant for the file alone and is removed here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform


class InlineSvg(SphinxPostTransform):
    """Replace images that are SVG files with the source of the files."""

    default_priority = 5  # run before Sphinx collects images to copy
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Replace the SVG images of one document."""
        for image in list(self.document.findall(nodes.image)):
            if not image["uri"].endswith(".svg"):
                continue
            text = (Path(self.app.srcdir) / image["uri"]).read_text(encoding="utf-8")
            text = re.sub(r"<style>.*?</style>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
            figure = text.replace("<svg ", '<svg class="figure" ', 1)
            image.replace_self(nodes.raw("", f'<div class="wide" tabindex="0">{figure}</div>', format="html"))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the transform."""
    app.add_post_transform(InlineSvg)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
