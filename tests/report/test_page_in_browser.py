"""The report in a real browser: no errors, no requests, nothing outside the window, and nothing that overlaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import WINDOWS, Browser, check_page

from ptd.report import report


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
    check_page(browser, pages[name], window, tmp_path / "page.png")


def test_the_test_sees(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    """The checks find each fault in a page that has all of them."""
    bad = tmp_path / "bad.html"
    fault = (
        "<script>console.error('said')</script><img src='missing.png'><p style='width: 200vw'>wide</p>"
        "<section style='margin-top: -9rem'>over</section>"
    )
    bad.write_text(pages["one"].read_text(encoding="utf-8").replace("</body>", f"{fault}</body>"), encoding="utf-8")
    browser.open(bad, width=1280)
    assert len(browser.complaints) >= 1
    assert len(browser.requests) == 2
    assert browser.too_wide > 0
    assert browser.beside() != []
    assert browser.over() != []
