"""The page of an inspection: one file that needs no network, in dark and light."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from ptd.inspection.tables import headline, sections
from ptd.versions import versions

TEMPLATE = Path(__file__).with_name("page.html")


def render(found: dict[str, Any], light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """HTML with the figures (PNG by name, for a light and a dark page) inside it."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    parts = [
        {**vars(part), "light": _data_uri(light, part.figure), "dark": _data_uri(dark, part.figure)}
        for part in sections(found)
    ]
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=found["method"] or found["peft_type"] or "prompt",
        head=headline(found),
        lines=found["notes"],
        sections=parts,
        version=versions()["ptd"],
    )


def _data_uri(pictures: Mapping[str, bytes], name: str | None) -> str:
    if name is None:
        return ""
    return "data:image/png;base64," + base64.b64encode(pictures[name]).decode("ascii")
