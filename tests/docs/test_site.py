"""The site that ``make docs`` builds: its links have targets, and a browser renders its pages without errors."""

from __future__ import annotations

import os
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browser import WINDOWS, Browser

SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"
SHOWS = {
    "index.html": "Quickstart",
    "methods.html": '<math xmlns="http://www.w3.org/1998/Math/MathML"',
    "reduction.html": '<svg class="figure"',
    "api.html": 'id="ptd.attach"',
}
"""Page → text that it has to contain after a browser has run its scripts."""

pytestmark = pytest.mark.skipif(not os.environ.get("PTD_DOCS"), reason="after make docs: PTD_DOCS=1, make docs-test")


class Page(HTMLParser):
    """The ``targets`` (ids) of a page and the ``links`` that it contains."""

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


PAGES = sorted(path.name for path in SITE.glob("*.html"))
SCROLLS = ".table-wrapper, .wide, .sig, pre, math"
"""Elements that may be wider than a phone, because each of them scrolls horizontally."""


def checked(browser: Browser, name: str, window: str) -> None:
    """Open a page of the site; assert that it logs no messages and requests only files of the site."""
    browser.open(SITE / name, **WINDOWS[window])
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(f"{SITE.as_uri()}/")] == []


@pytest.mark.parametrize("name", PAGES or ["index.html"])
def test_a_browser_does_not_complain(browser: Browser, name: str) -> None:
    """A page renders in a dark desktop window and on a phone, where only `SCROLLS` may be wider than the window."""
    checked(browser, name, "dark")
    headings = browser.evaluate("[...document.querySelectorAll('article h1, article h2')].map(each => each.innerText)")
    assert headings or name == "search.html"  # which has a heading only after a search with results
    assert all(heading.strip() for heading in headings)
    if name in SHOWS:
        assert SHOWS[name] in browser.evaluate("document.documentElement.outerHTML")
    checked(browser, name, "phone")
    assert browser.too_wide <= 0
    assert browser.beside("article", SCROLLS) == []


def test_colours_follow_the_reader(browser: Browser) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    shown = []
    for window in ("light", "dark"):
        checked(browser, "reduction.html", window)
        colours = browser.evaluate("[getComputedStyle(document.querySelector('svg.figure')).color, " + background + "]")
        shown.append(colours)
    assert shown[0][0] != shown[1][0]
    assert shown[0][1] != shown[1][1]
