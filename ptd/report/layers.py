"""Draw panels of stacked layers, whose values add up: over the steps of one run, or as one bar per run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

from ptd.report.panels import STEP, Panel
from ptd.report.theme import GLYPHS, SENTINEL, Theme

WIDTH, LEFT, RIGHT, BELOW, ABOVE, BAR = 4.0, 0.68, 0.18, 0.485, 0.52, 0.24
"""Inches: width of the figure, margins around the axes, height of a bar."""
COLUMNS = 4
"""Columns of the legend."""
LETTERS = 9
"""Letters of a run's name next to its bar, in figures that do not name the run by its mark."""


def draw_layers(panel: Panel, theme: Theme) -> Figure:
    """Draw a figure of layers with their legend, without a title."""
    height = max(2.85, BELOW + ABOVE + BAR * len(panel.bars))
    figure = Figure(figsize=(WIDTH, height), facecolor="none" if theme is SENTINEL else theme.paper)
    box = (LEFT / WIDTH, BELOW / height, 1 - (LEFT + RIGHT) / WIDTH, 1 - (BELOW + ABOVE) / height)
    axes = figure.add_axes(box, facecolor="none")
    colours = [theme.palette[layer.colour] if layer.colour >= 0 else theme.soft for layer in panel.curves]
    bottom = np.zeros(len(panel.curves[0].x))
    for layer, colour in zip(panel.curves, colours, strict=True):
        above = bottom + layer.y
        if panel.bars:
            axes.barh(layer.x, layer.y, left=bottom, height=0.7, color=colour, linewidth=0)
        else:
            axes.fill_between(layer.x, bottom, above, step="pre", color=colour, linewidth=0)
        bottom = above
    top = panel.top or 1.06 * float(bottom.max())
    _set_look(axes, panel, theme)
    if panel.bars:
        _set_bars(axes, panel, theme, top)
    else:
        axes.set(xlim=(panel.curves[0].x[0], panel.curves[0].x[-1]), ylim=(0, top))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, min_n_ticks=2))
        if panel.curves[0].x[-1] >= 10_000:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    patches = [Patch(color=colour, label=layer.label) for layer, colour in zip(panel.curves, colours, strict=True)]
    _legend(axes, patches, theme)
    return figure


def _set_look(axes: Axes, panel: Panel, theme: Theme) -> None:
    axes.set_xlabel(panel.unit if panel.bars else STEP, fontsize=8.5, color=theme.ink)
    axes.set_ylabel("" if panel.bars else panel.unit, fontsize=8.5, color=theme.ink)
    axes.tick_params(colors=theme.ink, labelsize=8, length=2.5)
    for side, spine in axes.spines.items():
        spine.set(color=theme.ink, alpha=0.5, visible=side in ("left", "bottom"))
    axes.set_axisbelow(True)
    axes.grid(axis="x" if panel.bars else "y", color=theme.ink, alpha=0.15, linewidth=0.6)


def _set_bars(axes: Axes, panel: Panel, theme: Theme, top: float) -> None:
    """Set the axes of bars; on a page the runs' marks name the bars, elsewhere the runs' names do."""
    marks = [GLYPHS[number % len(GLYPHS)] for number in range(len(panel.bars))]
    short = [name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…" for name in panel.bars]
    names = marks if theme is SENTINEL else short
    axes.set(xlim=(0, top), ylim=(len(names) - 0.4, -0.6))
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, min_n_ticks=2))
    for number, tick in enumerate(axes.get_yticklabels() if theme is SENTINEL else []):
        tick.set_color(theme.palette[number % len(theme.palette)])


def _legend(axes: Axes, handles: Sequence[Patch], theme: Theme) -> None:
    # matplotlib fills the legend by columns, but people read it by rows.
    rows = -(-len(handles) // COLUMNS)
    order = [row * COLUMNS + column for column in range(COLUMNS) for row in range(rows)]
    shown = [handles[place] for place in order if place < len(handles)]
    axes.legend(
        handles=shown,
        loc="lower left",
        bbox_to_anchor=(-0.16, 1.0),
        ncols=COLUMNS,
        frameon=False,
        fontsize=8,
        labelcolor=theme.ink,
        handlelength=0.9,
        columnspacing=1.0,
    )
