"""The HTML page of an inspection: one file that needs no network, with a dark and a light theme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from ptd.inspection.figures import TITLES, elements
from ptd.inspection.tables import headline, sections
from ptd.report.html import filled_page

TEMPLATE = Path(__file__).with_name("page.html")


def render_inspection(found: dict[str, Any]) -> str:
    """Return an HTML page with all results and the figures as SVG."""
    drawn = elements(found)
    parts = [
        {**vars(part), "figures": [(name, TITLES[name], Markup(drawn[name])) for name in part.figures if name in drawn]}
        for part in sections(found)
    ]
    return filled_page(
        TEMPLATE,
        title=found["method"] or found["peft_type"] or "prompt",
        head=headline(found),
        lines=found["notes"],
        sections=parts,
    )
