"""The site that ``make docs`` builds: its links lead somewhere, and a browser draws its pages without a complaint."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
SHOWS = {
    "index.html": "Quickstart",
    "methods.html": '<math xmlns="http://www.w3.org/1998/Math/MathML"',
    "reduction.html": '<svg class="figure"',
    "api.html": 'id="ptd.attach"',
}
"""Page → what has to be in it once a browser has run its scripts."""

pytestmark = pytest.mark.skipif(not os.environ.get("PTD_DOCS"), reason="after make docs: PTD_DOCS=1, make docs-test")


class Page(HTMLParser):
    """Its ``targets`` and what it ``links`` to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.targets.add(found.get("id") or "")
        self.links += [found[name] or "" for name in ("href", "src") if name in found]


page = cache(Page)


def test_every_link_leads_somewhere() -> None:
    pages = sorted(SITE.glob("*.html"))
    assert len(pages) > 20, "make docs builds the site"
    broken = []
    for path in pages:
        for link in page(path).links:
            parts = urlsplit(link)
            if parts.scheme or (path.name == "search.html" and not link):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists() or (
                parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in page(target).targets
            ):
                broken.append(f"{path.name}: {link}")
    assert broken == []


@pytest.mark.parametrize("name", SHOWS)
def test_a_browser_does_not_complain(name: str, tmp_path: Path) -> None:
    if CHROMIUM is None:
        if os.environ.get("PTD_REQUIRE_BROWSER"):
            pytest.fail("there is no chromium, and PTD_REQUIRE_BROWSER=1")
        pytest.skip("there is no chromium on this machine")
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={tmp_path}", (SITE / name).as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert re.findall(r".*CONSOLE.*", done.stderr) == []
    assert SHOWS[name] in done.stdout
