"""The figures of an inspection, in the colours of a theme: white paper (PNG) or the HTML page that contains them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ptd.report.svg import inline
from ptd.report.theme import LIGHT, SENTINEL, Theme

WIDTH, HEIGHT, DPI = 4.0, 2.7, 300
"""Width and height in inches, resolution in dpi. A phone shows a figure at about this size, other screens larger."""
ROW, MOST = 0.15, 7.0
"""Height in inches of a heatmap's row and of the tallest heatmap; with more layers, not every row has a label."""
SMALL, LETTERS = 8.0, 8.5
"""Font size in points of numbers and legends, and of the axes' labels."""
KEYS, VALUES, WORSE = 0, 1, 1
"""Indices of colours in the palette; embeddings have the colour of keys."""
TITLES = {
    "keep": "Loss with only the most useful tokens",
    "tokens": "Loss without each virtual token",
    "attention": "Queries: all own tokens",
    "attention_supervised": "Queries: supervised positions",
    "norms": "Norms per layer",
    "ranks": "Ranks per layer",
    "spectrum": "Energy of the largest singular values",
}
SETS = {"attention": "all", "attention_supervised": "supervised"}


def save(found: dict[str, Any]) -> dict[str, bytes]:
    """Return the PNG file of each figure by name, for white paper."""
    pictures = {}
    for name, figure in figures(found).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        pictures[name] = buffer.getvalue()
    return pictures


def elements(found: dict[str, Any]) -> dict[str, str]:
    """Return ``<svg>`` elements by name, in the colours of a page that has `ptd.report.theme.style`."""
    return {
        name: inline(figure, number, f"{TITLES[name]}: {_axes_in_words(figure)}")
        for number, (name, figure) in enumerate(figures(found, SENTINEL).items())
    }


def figures(found: dict[str, Any], theme: Theme = LIGHT) -> dict[str, Figure]:
    """Return the figures for which ``found`` has data, by name, without their `TITLES`."""
    return {name: make(found, theme) for name, make in _makers(found)}


def _makers(found: dict[str, Any]) -> Iterator[tuple[str, Callable[[dict[str, Any], Theme], Figure]]]:
    if found["data"] is not None:
        yield "keep", _keep
        yield "tokens", _tokens
        for name, queries in SETS.items():
            if any(layer[queries] is not None for layer in found["attention"]):
                yield name, partial(_attention, queries=queries)
    if len({each["layer"] for each in found["tensors"]}) > 1:
        yield "norms", _norms
        yield "ranks", _ranks
    else:
        yield "spectrum", _spectrum


def _figure(theme: Theme, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(
        figsize=(WIDTH, height), facecolor="none" if theme is SENTINEL else theme.paper, layout="constrained"
    )
    axes = figure.add_subplot(facecolor="none")
    axes.tick_params(colors=theme.ink, labelsize=SMALL, which="both", length=2.5)
    for side, spine in axes.spines.items():
        spine.set(color=theme.ink, alpha=0.5, visible=side in ("left", "bottom"))
    axes.grid(color=theme.ink, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _name_axes(axes: Axes, theme: Theme, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=LETTERS, color=theme.ink)
    axes.set_ylabel(y, fontsize=LETTERS, color=theme.ink)


def _axes_in_words(figure: Figure) -> str:
    axes, *bars = figure.axes
    shown = f"{axes.get_ylabel()} over {axes.get_xlabel()}"
    return f"{bars[0].get_xlabel()} by {axes.get_ylabel()} and {axes.get_xlabel()}" if bars else shown


def _legend_above(axes: Axes, theme: Theme) -> None:
    """Place the legend above the axes in two columns, where it covers no curve."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=2,
        frameon=False,
        fontsize=SMALL,
        labelcolor=theme.ink,
        handlelength=1.8,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def _integers(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def _keep(found: dict[str, Any], theme: Theme) -> Figure:
    figure, axes = _figure(theme)
    sizes, losses = ([point[key] for point in found["keep"]] for key in ("tokens", "loss"))
    axes.plot(sizes, losses, color=theme.palette[KEYS], lw=1.3, marker="o", markersize=3.5, label="most useful tokens")
    axes.axhline(found["loss"]["whole"], color=theme.ink, alpha=0.6, ls="--", lw=1, label="whole prompt")
    if found["enough"] is not None:
        label = f"95 % of the gain: {found['enough']} tokens"
        axes.axvline(found["enough"], color=theme.palette[VALUES], ls=":", lw=1.5, label=label)
    _name_axes(axes, theme, "virtual tokens kept (number)", "loss (nats per prediction)")
    axes.set_xlim(-0.02 * sizes[-1], 1.02 * sizes[-1])
    _integers(axes)
    _legend_above(axes, theme)
    return figure


def _tokens(found: dict[str, Any], theme: Theme) -> Figure:
    figure, axes = _figure(theme)
    changes = [each["loss_change"] for each in found["tokens"]]
    colours = [theme.palette[KEYS if change >= 0 else WORSE] for change in changes]
    axes.bar(range(len(changes)), changes, color=colours, width=0.8)
    axes.axhline(0, color=theme.ink, lw=0.8, alpha=0.6)
    _name_axes(axes, theme, "virtual token (index)", "change of the loss (nats)")
    axes.set_xlim(-0.7, len(changes) - 0.3)
    axes.grid(visible=False, axis="x")
    _integers(axes)
    return figure


def _attention(found: dict[str, Any], theme: Theme, queries: str) -> Figure:
    layers = [layer for layer in found["attention"] if layer["all"] is not None]
    heads = max(len(layer["all"]) for layer in layers)
    height = min(MOST, 1.5 + ROW * max(len(layers), 8))
    figure, axes = _figure(theme, height)
    grid = np.full((len(layers), heads), math.nan)
    for row, layer in enumerate(layers):
        if layer[queries] is not None:
            grid[row, : len(layer[queries])] = 100 * np.array(layer[queries])
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=100, interpolation="none")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    names, plain = _short_names([layer["layer"] for layer in layers])
    _name_axes(axes, theme, "head (index)", "layer (index)" if plain else "attention layer")
    _integers(axes)
    step = math.ceil(len(layers) * ROW / (height - 1.4))
    axes.set_yticks(range(0, len(layers), step), names[::step])
    bar = figure.colorbar(image, ax=axes, location="top", pad=0.02, aspect=30)
    bar.set_label("share of attention on the prompt (%)", color=theme.ink, fontsize=LETTERS)
    bar.ax.tick_params(colors=theme.ink, labelsize=SMALL, length=2.5)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set_rasterized(True)  # an SVG would hold 256 rectangles otherwise
    return figure


def _short_names(names: list[str]) -> tuple[list[str], bool]:
    """Return the layers' numbers if all layers are of the same kind, else their names; and whether they are."""
    plain = all(name.startswith("layer ") for name in names)
    return [name.removeprefix("layer ") for name in names], plain


def _by_layer(found: dict[str, Any], theme: Theme, unit: str) -> tuple[Figure, Axes, list[str]]:
    """Return an empty figure over the layers, its axes, and the layers' names.

    At most 8 layers are labelled, because the names in an encoder-decoder are words.
    """
    figure, axes = _figure(theme, HEIGHT + 0.3)
    given = list(dict.fromkeys(each["layer"] for each in found["tensors"]))
    names, plain = _short_names(given)
    shown = sorted({round(index) for index in np.linspace(0, len(names) - 1, min(len(names), 8))})
    axes.set_xticks(shown, [names[index] for index in shown], rotation=0 if plain else 90)
    _name_axes(axes, theme, "layer (index)" if plain else "attention layer", unit)
    return figure, axes, given


def _norms(found: dict[str, Any], theme: Theme) -> Figure:
    figure, axes, names = _by_layer(found, theme, "norm of a head's vector (no unit)")
    own = {layer["layer"]: layer["own_norms"] for layer in found.get("attention", ())}
    for part, colour, tensors in _parts(found, theme):
        norms = [each["norm"] for each in tensors]
        axes.plot(norms, label=f"prefix {part}s", color=colour, lw=1.3, marker="o", markersize=3)
        if own:
            norms = [own[name][part] for name in names]
            axes.plot(norms, label=f"{part}s of the text", color=colour, lw=1.3, ls="--")
    axes.set_ylim(bottom=0)
    _legend_above(axes, theme)
    return figure


def _ranks(found: dict[str, Any], theme: Theme) -> Figure:
    most = max(len(each["energy"]) for each in found["tensors"])
    figure, axes, _ = _by_layer(found, theme, f"dimensions (of at most {most})")
    for part, colour, tensors in _parts(found, theme):
        effective, enough = ([each[key] for each in tensors] for key in ("effective_rank", "rank_90"))
        axes.plot(effective, label=f"{part}s: effective rank", color=colour, lw=1.3, marker="o", markersize=3)
        axes.plot(enough, label=f"{part}s: 90 % of energy", color=colour, lw=1.3, ls=":")
    axes.set_ylim(bottom=0)
    _legend_above(axes, theme)
    return figure


def _parts(found: dict[str, Any], theme: Theme) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield keys and values (or embeddings): name, colour, and the entries of all layers."""
    for number, part in enumerate(dict.fromkeys(each["part"] for each in found["tensors"])):
        yield part, theme.palette[(KEYS, VALUES)[number]], [each for each in found["tensors"] if each["part"] == part]


def _spectrum(found: dict[str, Any], theme: Theme) -> Figure:
    figure, axes = _figure(theme)
    for part, colour, tensors in _parts(found, theme):
        energy = [0.0, *(100 * share for share in tensors[0]["energy"])]
        label = f"{part}s: effective rank {tensors[0]['effective_rank']:.1f}"
        axes.plot(energy, label=label, color=colour, lw=1.3, marker="o", markersize=3)
    axes.axhline(90, color=theme.ink, alpha=0.6, ls="--", lw=1, label="90 %")
    _name_axes(axes, theme, "largest singular values (number)", "share of the energy (%)")
    axes.set(ylim=(0, 105), xlim=(0, None))
    _integers(axes)
    _legend_above(axes, theme)
    return figure
