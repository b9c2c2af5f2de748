"""Draw panels as figures, and write figures as PNG, or as SVG that takes its colours from the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from ptd.report.data import read_run
from ptd.report.layers import draw_layers
from ptd.report.panels import STEP, Curve, Panel, panels, thin
from ptd.report.svg import inline, quietly
from ptd.report.theme import LIGHT, MARKERS, SENTINEL, Theme

SIZE = (4.0, 2.55)
"""Inches; a page shows a figure at about this size on a phone, and larger on other screens."""
COLUMNS, FEWEST_COLUMNS = 600, 60
"""Columns to which `thin` reduces longer series: for a single curve, and at least for each of many curves."""
SHORT_LEGEND = 36
"""Letters of all labels, without their marks, up to which a legend fits above a plot."""
MEAN_FROM, MEAN_SHARE = 100, 50
"""With at least `MEAN_FROM` records, a curve is pale under its running mean over 1/`MEAN_SHARE` of the records."""


def draw(panel: Panel, theme: Theme, *, legend: bool) -> Figure:
    """Draw one figure, without a title. ``legend``: name the curves in the figure (layers are always named)."""
    if panel.layers:
        return draw_layers(panel, theme)
    figure = Figure(figsize=SIZE, facecolor="none" if theme is SENTINEL else theme.paper)
    axes = figure.add_axes((0.17, 0.19, 0.8, 0.7 if legend else 0.76), facecolor="none")
    columns = max(FEWEST_COLUMNS, COLUMNS // len(panel.curves))
    marked = len({each.colour for each in panel.curves if not each.dashed}) > 2
    lines = [_add(axes, curve, theme, columns, marked=marked) for curve in panel.curves]
    for mark in panel.marks:
        axes.axvline(mark, color=theme.ink, alpha=0.35, linewidth=0.8, linestyle=(0, (2, 2)))
    _set_axes(axes, panel, theme)
    left, right = axes.get_xlim()
    for mark, word in panel.alarms:
        axes.axvline(mark, color=theme.ink, linewidth=0.9)
        side = "left" if mark - left < 0.1 * (right - left) else "right"
        look: dict[str, Any] = {"fontsize": 8, "color": theme.ink, "rotation": 90, "va": "top", "ha": side}
        axes.text(mark, 0.98, f"{word} ", transform=axes.get_xaxis_transform(), parse_math=False, **look)
    if legend:
        _legend(axes, lines, panel, theme)
    return figure


def _add(axes: Axes, curve: Curve, theme: Theme, columns: int, *, marked: bool) -> Line2D:
    x, y = thin(curve.x, curve.y, columns)
    number = curve.colour % len(theme.palette)
    options: dict[str, Any] = {"color": theme.palette[number] if curve.colour >= 0 else theme.soft, "linewidth": 1.3}
    if curve.dashed:
        options["linestyle"] = (0, (4, 2))
    if len(curve.x) >= MEAN_FROM and not curve.dots:
        axes.plot(x, y, color=theme.palette[number], linewidth=0.8, alpha=0.3)
        x, y = running_mean(curve.x, curve.y, MEAN_SHARE)
    if curve.dots and len(x) <= 60:
        options |= {"marker": MARKERS[number], "markersize": 3.6}
    elif len(x) == 1:
        options |= {"marker": MARKERS[number], "markersize": 4}
    elif marked and not curve.dashed:  # a few markers, at different places on each line
        options |= {"marker": MARKERS[number], "markersize": 3.6, "markevery": (0.04 * (1 + number), 0.25)}
    return axes.plot(x, y, **options)[0]


def running_mean(x: np.ndarray, y: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return means of the finite values in windows of 1/``parts`` of the records; neighbours overlap by half."""
    width = max(1, len(x) // parts)
    starts = np.arange(0, len(x) - width + 1, max(1, width // 2))
    finite = np.isfinite(y)
    sums, counts = (np.concatenate([[0.0], np.cumsum(each)]) for each in (np.where(finite, y, 0.0), finite))
    many = counts[starts + width] - counts[starts]
    with np.errstate(invalid="ignore"):
        means = (sums[starts + width] - sums[starts]) / many
    return x[starts + (width - 1) // 2], means


def _set_axes(axes: Axes, panel: Panel, theme: Theme) -> None:
    axes.set_xlabel(STEP, fontsize=8.5, color=theme.ink)
    axes.set_ylabel(panel.unit, fontsize=8.5, color=theme.ink, parse_math=False)
    axes.tick_params(colors=theme.ink, labelsize=8, which="both", length=2.5)
    for side, spine in axes.spines.items():
        spine.set(color=theme.ink, alpha=0.5, visible=side in ("left", "bottom"))
    axes.grid(color=theme.ink, alpha=0.15, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    last = max(float(curve.x[-1]) for curve in panel.curves)
    if last >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.tick_params(labelsize=8, which="minor", labelleft=False)
        return
    top = max(float(np.nanmax(curve.y)) for curve in panel.curves)
    if panel.from_zero:
        axes.set_ylim(0, 1.06 * top if top > 0 else 1)
    if top >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:.6g}"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, min_n_ticks=2))


def _legend(axes: Axes, lines: Sequence[Line2D], panel: Panel, theme: Theme) -> None:
    # matplotlib ignores labels that begin with an underscore.
    named = [(line, curve.label) for line, curve in zip(lines, panel.curves, strict=True) if curve.label]
    labels = [f" {label}"[label[:1] != "_" :][:40] for _, label in named]
    place: dict[str, Any] = {"loc": "best"}
    if len(labels) <= 2 or sum(map(len, labels)) <= SHORT_LEGEND:  # above the plot
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": len(labels), "borderaxespad": 0.2}
    look = {"frameon": False, "fontsize": 8, "labelcolor": theme.ink, "handlelength": 1.8, "columnspacing": 1.2}
    legend = axes.legend([line for line, _ in named], labels, **look, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)


def png(panel: Panel, path: Path, *, dpi: int = 200) -> None:
    """Write one panel as a PNG file, in light colours. Raises `OSError`."""
    buffer = io.BytesIO()
    with quietly():
        draw(panel, LIGHT, legend=len(panel.curves) > 1).savefig(buffer, format="png", dpi=dpi)
    path.write_bytes(buffer.getvalue())


def plot_loss(folder: Path) -> Path | None:
    """Draw ``loss.png`` from the records of a run's folder and return its path; None if there is nothing to draw."""
    found = [panel for panel in panels([read_run(folder)]) if panel.name == "loss"]
    for panel in found:
        png(panel, folder / "loss.png")
    return folder / "loss.png" if found else None


def svg(panel: Panel, number: int, *, legend: bool) -> str:
    """Return the ``number``-th figure of a page as an ``<svg>`` element, in the page's colours."""
    over = f"of {len(panel.bars)} runs" if panel.bars else f"over {STEP}"
    return inline(draw(panel, SENTINEL, legend=legend), number, f"{panel.title}: {panel.unit} {over}")


def save_pngs(found: Sequence[Panel], folder: Path) -> list[Path]:
    """Write one PNG file per panel and return the files. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for panel in found:
        files.append(folder / f"{panel.name}.png")
        png(panel, files[-1], dpi=300)
    return files
