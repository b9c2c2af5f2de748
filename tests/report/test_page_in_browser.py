"""The page in a real browser: no complaint, no request, nothing beside the window, nothing over anything else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser

from ptd.report import report

WINDOWS: dict[str, dict[str, Any]] = {
    "light": {"width": 1280},
    "dark": {"width": 1280, "dark": True},
    "phone": {"width": 390, "height": 844, "mobile": True},
    "dark phone": {"width": 390, "height": 844, "mobile": True, "dark": True},
}
BESIDE = """[...document.querySelectorAll('body *')].filter(element => !element.closest('.scroll, pre, svg')
  && element.getBoundingClientRect().right > innerWidth + 1).map(element => element.outerHTML.slice(0, 80))"""
OVER = """(() => {
  const found = [];
  const meets = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  const check = (elements, where) => {
    const boxes = elements.map(element => [element, element.getBoundingClientRect()]);
    for (const [i, [one, a]] of boxes.entries()) for (const [other, b] of boxes.slice(i + 1))
      if (meets(a, b)) found.push(`${where}: ${one.textContent.slice(0, 40)} / ${other.textContent.slice(0, 40)}`);
  };
  check([...document.querySelectorAll('header, section, footer')], 'sections');
  check([...document.querySelectorAll('figure')], 'figures');
  for (const plot of document.querySelectorAll('svg.plot')) {
    const frame = plot.getBoundingClientRect();
    const words = [...plot.querySelectorAll('text')];
    check(words, plot.getAttribute('aria-label'));
    for (const word of words) {
      const box = word.getBoundingClientRect();
      const across = box.left >= frame.left - 1 && box.right <= frame.right + 1;
      if (!across || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        found.push(`outside of ${plot.getAttribute('aria-label')}: ${word.textContent}`);
    }
  }
  return found;
})()"""
SMALLEST = """Math.min(...[...document.querySelectorAll('svg.plot text')].map(word =>
  parseFloat(getComputedStyle(word).fontSize) * word.ownerSVGElement.getScreenCTM().a))"""
COLOURS = "[getComputedStyle(document.body).color, getComputedStyle(document.querySelector('svg.plot text')).fill]"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        if os.environ.get("PTD_REQUIRE_BROWSER") == "1":
            pytest.fail("there is no chromium, and PTD_REQUIRE_BROWSER=1")
        pytest.skip("there is no chromium on this machine")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(write_run: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    long = "a-rather-long-name_" * 6
    runs = [
        write_run(folder / "short", steps=3, ranks=1),
        write_run(folder / long, steps=500, label=f"{'many words ' * 30}{long}", labels=8),
        write_run(folder / "million", steps=20_000, train={"learning_rate": 3e-7, "seed": 3}),
    ]
    found = {}
    for name, chosen in {"one": runs[:1], "long": runs[1:2], "million": runs[2:], "three": runs}.items():
        found[name] = folder / f"{name}.html"
        report(chosen, found[name])
    return found


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["one", "long", "million", "three"])
def test_page(browser: Browser, pages: dict[str, Path], name: str, window: str, tmp_path: Path) -> None:
    browser.open(pages[name], **WINDOWS[window])
    assert browser.complaints == []
    assert browser.requests == [pages[name].as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert browser.evaluate("innerWidth") == WINDOWS[window]["width"]
    assert browser.evaluate(BESIDE) == []
    assert browser.evaluate(OVER) == []
    assert browser.evaluate(SMALLEST) >= 9
    dark = WINDOWS[window].get("dark", False)
    assert browser.evaluate(COLOURS) == ["rgb(230, 230, 230)" if dark else "rgb(27, 31, 36)"] * 2
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_the_test_sees(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    """A page with all these faults is found out."""
    bad = tmp_path / "bad.html"
    fault = (
        "<script>console.error('said')</script><img src='missing.png'><p style='width: 200vw'>wide</p>"
        "<section style='margin-top: -9rem'>over</section>"
    )
    bad.write_text(pages["one"].read_text(encoding="utf-8").replace("</body>", f"{fault}</body>"), encoding="utf-8")
    browser.open(bad, width=1280)
    assert len(browser.complaints) >= 1
    assert len(browser.requests) == 2
    assert browser.evaluate("document.documentElement.scrollWidth - innerWidth") > 0
    assert browser.evaluate(BESIDE) != []
    assert browser.evaluate(OVER) != []
