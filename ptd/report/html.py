"""Fill the templates of pages, all of which extend base.html."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ptd.report.theme import style
from ptd.versions import versions

BASE = Path(__file__).parent


def filled_page(template: Path, **values: Any) -> str:
    """Return the page of a ``template`` that extends base.html. All values are escaped except `Markup`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, BASE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template(template.name)
    return page.render(style=Markup(style()), version=versions().get("ptd", ""), **values)
