"""Turn figures into ``<svg>`` elements of a page, in the page's colours and font, without further files."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from ptd.report.theme import to_css

SVG = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"


def inline(figure: Figure, number: int, label: str) -> str:
    """Return the ``number``-th figure of a page, drawn in `SENTINEL`'s colours; screen readers read ``label``."""
    buffer = io.StringIO()
    with quietly(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ptd"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), number, label)


class quietly(warnings.catch_warnings):
    """Suppress warnings about letters that matplotlib's font does not have: the page has its own fonts."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        return entered


def _inline(text: str, number: int, label: str) -> str:
    """Remove what a page does not need, make identifiers unique among figures, and use the page's colours."""
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in [each for each in parent if each.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    names = {name: f"plot{number}-{index}" for index, name in enumerate(sorted(used))}
    for element in root.iter():
        own = element.attrib.pop("id", None)
        if own in names:
            element.set("id", names[own])
        target = element.attrib.pop(XLINK, None)
        if target is not None:  # a reference within this file, or the data of an image
            element.set("href", f"#{names[target[1:]]}" if target.startswith("#") else "".join(target.split()))
        if "clip-path" in element.attrib:
            element.set("clip-path", f"url(#{names[element.attrib['clip-path'][5:-1]]})")
        if "d" in element.attrib:
            element.set("d", _shorter(element.attrib["d"]))
        if "style" in element.attrib:
            element.set("style", _style(element.attrib["style"]))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("class", "plot")
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def _shorter(path: str) -> str:
    """Round the numbers of a path to two decimals, a hundredth of a point."""
    return re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", " ".join(path.split()))


def _style(style: str) -> str:
    for colour, variable in to_css().items():
        style = style.replace(colour, variable)
    # Keep the font size, but use the page's font.
    return re.sub(r"font: (?:[\w ]+ )?([\d.]+px) [^;]+", r"font-size: \1", style)
