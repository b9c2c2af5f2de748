"""The figures of an inspection, as PNG files for a light or a dark page."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH, DPI = 7.0, 150
"""Inches; on a phone a figure is scaled to the screen, so its letters are large."""
INK = {False: ("#1b1f24", "#ffffff"), True: ("#e6e6e6", "#16191d")}
COLOURS = {"key": "#4c8dd6", "value": "#e08a2e", "embedding": "#4c8dd6"}
BAR, WORSE, LINE = "#4c8dd6", "#d9534f", "#4c8dd6"
TITLES = {"all": "queries: all own tokens", "supervised": "queries: supervised positions"}


def draw(found: dict[str, Any], *, dark: bool = False) -> dict[str, bytes]:
    """PNG by name: ``prompt``, and of rows ``attention``, ``tokens`` and ``keep``."""
    pictures = {}
    for name, figure in figures(found, dark=dark).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        pictures[name] = buffer.getvalue()
    return pictures


def figures(found: dict[str, Any], *, dark: bool = False) -> dict[str, Figure]:
    """The figures by name."""
    makers: dict[str, Callable[[dict[str, Any], bool], Figure]] = {"prompt": _prompt}
    if found["data"] is not None:
        makers |= {"attention": _attention, "tokens": _tokens, "keep": _keep}
    return {name: make(found, dark) for name, make in makers.items()}


def _figure(height: float, dark: bool, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Panels side by side, in the colours of the page."""
    ink, paper = INK[dark]
    figure = Figure(figsize=(WIDTH, height), facecolor=paper, layout="constrained")
    axes = [figure.add_subplot(1, panels, number + 1, facecolor=paper) for number in range(panels)]
    for each in axes:
        each.tick_params(colors=ink, which="both")
        for side, spine in each.spines.items():
            spine.set(color=ink, alpha=0.4, visible=side in ("left", "bottom"))
        for text in (each.xaxis.label, each.yaxis.label, each.title):
            text.set_color(ink)
    return figure, axes


def _legend(axes: Axes, dark: bool, **options: Any) -> None:
    ink, paper = INK[dark]
    axes.legend(facecolor=paper, edgecolor="none", framealpha=0.85, labelcolor=ink, **options)


def _attention(found: dict[str, Any], dark: bool) -> Figure:
    layers = [layer for layer in found["attention"] if layer["all"] is not None]
    sets = [name for name in TITLES if any(layer[name] is not None for layer in layers)]
    heads = max(len(layer["all"]) for layer in layers)
    height = min(14.0, 1.9 + 0.24 * max(len(layers), 4))
    figure, axes = _figure(height, dark, len(sets))
    ink = INK[dark][0]
    for each, name in zip(axes, sets, strict=True):
        grid = np.full((len(layers), heads), math.nan)
        for row, layer in enumerate(layers):
            if layer[name] is not None:
                grid[row, : len(layer[name])] = 100 * np.array(layer[name])
        image = each.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
        each.spines[:].set_visible(False)
        each.set_title(TITLES[name], fontsize=10)
        each.set_xlabel("head")
        each.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        step = math.ceil(len(layers) / 40)
        each.set_yticks(range(0, len(layers), step), [layer["layer"] for layer in layers][::step], fontsize=8)
        if each is not axes[0]:
            each.set_yticklabels([])
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=max(20, 7 * height))
    bar.set_label("share of attention on the prompt (%)", color=ink)
    bar.ax.tick_params(colors=ink)
    bar.outline.set_visible(False)
    return figure


def _prompt(found: dict[str, Any], dark: bool) -> Figure:
    tensors = found["tensors"]
    return _by_layer(found, dark) if len({each["layer"] for each in tensors}) > 1 else _spectrum(found, dark)


def _by_layer(found: dict[str, Any], dark: bool) -> Figure:
    figure, (norms, ranks) = _figure(3.6, dark, 2)
    names = list(dict.fromkeys(each["layer"] for each in found["tensors"]))
    at = range(len(names))
    own = {layer["layer"]: layer["own_norms"] for layer in found.get("attention", ())}
    for part in dict.fromkeys(each["part"] for each in found["tensors"]):
        of_part, colour = [each for each in found["tensors"] if each["part"] == part], COLOURS[part]
        of_prefix = [each["norm"] for each in of_part]
        norms.plot(at, of_prefix, label=f"prefix {part}s", color=colour, marker="o", markersize=3.5)
        if own:
            norms.plot(at, [own[name][part] for name in names], label=f"{part}s of the text", ls="--", color=colour)
        effective, most = ([each[key] for each in of_part] for key in ("effective_rank", "rank_90"))
        ranks.plot(at, effective, label=f"{part}s: effective rank", color=colour, marker="o", markersize=3.5)
        ranks.plot(at, most, label=f"{part}s: 90 % of energy", ls=":", color=colour)
    norms.set_ylabel("norm of a head's vector (no unit)")
    ranks.set_ylabel(f"dimensions (at most {_largest_rank(found)})")
    # A few labels only: those of an encoder-decoder are words.
    shown = sorted({round(index) for index in np.linspace(0, len(names) - 1, min(len(names), 8))})
    plain = all(name.startswith("layer ") for name in names)
    labels = [names[index].removeprefix("layer ") for index in shown]
    for axes in (norms, ranks):
        axes.set_ylim(bottom=0)
        axes.set_xticks(shown, labels, rotation=0 if plain else 60, fontsize=8)
        axes.set_xlabel("layer" if plain else "attention layer")
        _legend(axes, dark, fontsize=8, loc="lower left", bbox_to_anchor=(-0.12, 1.0), ncols=2, columnspacing=1)
    return figure


def _largest_rank(found: dict[str, Any]) -> int:
    return max(len(each["energy"]) for each in found["tensors"])


def _spectrum(found: dict[str, Any], dark: bool) -> Figure:
    figure, (axes,) = _figure(3.4, dark)
    for each in found["tensors"]:
        energy = [0.0, *each["energy"]]
        label = f"{each['part']}s: effective rank {each['effective_rank']:.1f}"
        axes.plot(range(len(energy)), [100 * share for share in energy], label=label, color=COLOURS[each["part"]],
                  marker="o", markersize=3)  # fmt: skip
    axes.axhline(90, color=INK[dark][0], alpha=0.4, ls="--", lw=1, label="90 %")
    axes.set(xlabel="largest singular values (number)", ylabel="share of the energy (%)", ylim=(0, 105), xlim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{found['num_virtual_tokens']} virtual tokens: how many directions they take", fontsize=10)
    _legend(axes, dark, fontsize=9, loc="lower right")
    return figure


def _tokens(found: dict[str, Any], dark: bool) -> Figure:
    figure, (axes,) = _figure(3.4, dark)
    changes = [each["loss_change"] for each in found["tokens"]]
    axes.bar(range(len(changes)), changes, color=[BAR if change >= 0 else WORSE for change in changes], width=0.8)
    axes.axhline(0, color=INK[dark][0], lw=0.8, alpha=0.6)
    axes.set(xlabel="virtual token", ylabel="change of the loss (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(
        f"loss without each virtual token ({found['data']['rows']} rows); above 0 the token helps", fontsize=10
    )
    return figure


def _keep(found: dict[str, Any], dark: bool) -> Figure:
    figure, (axes,) = _figure(3.6, dark)
    sizes, losses = ([point[key] for point in found["keep"]] for key in ("tokens", "loss"))
    axes.plot(sizes, losses, color=LINE, marker="o", markersize=4, label="k most useful virtual tokens")
    axes.axhline(found["loss"]["whole"], color=INK[dark][0], alpha=0.5, ls="--", lw=1, label="whole prompt")
    if found["enough"] is not None:
        axes.axvline(found["enough"], color=COLOURS["value"], ls=":", lw=1.5,
                     label=f"95 % of the gain: {found['enough']} tokens")  # fmt: skip
    axes.set(xlabel="virtual tokens kept, k", ylabel="loss (nats per prediction)", xlim=(-0.4, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    title = f"loss with the most useful tokens only ({found['data']['rows']} rows)"
    figure.suptitle(title, fontsize=10, color=INK[dark][0])
    _legend(axes, dark, fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)  # above: clear of the curve
    return figure
