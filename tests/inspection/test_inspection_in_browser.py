"""The page of an inspection in a real browser: everything is present and labelled, and nothing overlaps."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from browser import WINDOWS, Browser, check_page
from families import save_backbone

from ptd.inspection import inspect, write_inspection
from ptd.inspection.effects import sizes_to_try
from ptd.types import LayerShape, PrefixLayout, SoftLayout

support = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("support.py"))))
ON_ROWS = ["needed", "tokens", "attention"]
SECTIONS = {
    "prefix": [*ON_ROWS, "prompt"],
    "large": [*ON_ROWS, "prompt"],
    "soft tokens": [*ON_ROWS, "prompt", "nearest"],
    "encoder-decoder": [*ON_ROWS, "prompt"],
    "without rows": ["prompt"],
}
HEAD, SHARE = "head (index)", "share of attention on the prompt (%)"
LAYER = {"encoder-decoder": "attention layer"}
"""Page -> the label of its layer axis, for pages whose layers have names instead of numbers."""
PLOTS = {
    "keep": {"virtual tokens kept (number)", "loss (nats per prediction)"},
    "tokens": {"virtual token (index)", "change of the loss (nats)"},
    "attention": {HEAD, "layer (index)", SHARE},
    "attention_supervised": {HEAD, "layer (index)", SHARE},
    "norms": {"layer (index)", "norm of a head's vector (no unit)"},
    "ranks": {"layer (index)", "dimensions (of at most 4)"},
    "spectrum": {"largest singular values (number)", "share of the energy (%)"},
}
"""Figure -> the labels of its axes."""
BY_LAYER = {"norms", "ranks"}
WORDS = """Object.fromEntries([...document.querySelectorAll('figure')].map(figure =>
  [figure.id, [...figure.querySelectorAll('svg text')].map(word => word.textContent)]))"""


@pytest.fixture(scope="module")
def pages(
    tmp_path_factory: pytest.TempPathFactory, backbone_dir: Path, rows: Path, of_prefix: dict[str, Any]
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    kinds = ["encoder", "encoder", "decoder", "cross", "decoder", "cross"]
    crossed = PrefixLayout(tuple(LayerShape(4, 12, 12, kind) for kind in kinds))
    t5, both = save_backbone(folder / "t5", "t5"), {"kind": "seq2seq_lm"}
    soft = support.saved(folder / "soft", backbone_dir, SoftLayout(support.HIDDEN))
    found = {
        "prefix": of_prefix,
        "large": support.large(of_prefix, layers=32, heads=32, tokens=64, kept=sizes_to_try(64)),
        "soft tokens": inspect(soft, data=str(rows)),
        "encoder-decoder": inspect(support.saved(folder / "crossed", t5, crossed, task=both), data=str(rows)),
        "without rows": inspect(of_prefix["folder"]),
    }
    for name, result in found.items():
        write_inspection(result, folder / name)
    return {name: folder / name / "index.html" for name in found}


def plots(name: str) -> set[str]:
    alone = {"spectrum"} if name == "soft tokens" else BY_LAYER
    return alone if name == "without rows" else alone | set(PLOTS) - BY_LAYER - {"spectrum"}


@pytest.mark.parametrize("name", SECTIONS)
def test_everything_is_there(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name], width=1280)
    assert (
        browser.evaluate("[...document.querySelectorAll('main section')].map(section => section.id)")
        == (SECTIONS[name])
    )
    assert browser.evaluate("[...document.querySelectorAll('nav a')].every(link => document.querySelector(link.hash))")
    words = browser.evaluate(WORDS)
    assert set(words) == {f"plot-{plot}" for plot in plots(name)}
    for plot in plots(name):
        labels = {label.replace("layer (index)", LAYER.get(name, "layer (index)")) for label in PLOTS[plot]}
        assert labels <= set(words[f"plot-{plot}"]), plot
    assert browser.evaluate("[...document.querySelectorAll('section')].every(part => part.querySelector('tbody td'))")
    assert pages[name].stat().st_size < 5 << 20


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", SECTIONS)
def test_page(browser: Browser, pages: dict[str, Path], name: str, window: str, tmp_path: Path) -> None:
    check_page(browser, pages[name], window, tmp_path / "page.png")
