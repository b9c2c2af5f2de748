"""Write the results of a benchmark: ``bench.json``, ``bench.png``, and one plot per sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptd.checkpoint.files import make_folders, write_json, writing
from ptd.types import UserError

COLOURS = {"data": "#b3b3b3", "encoder": "#e78ac3", "forward": "#66c2a5", "backward": "#8da0cb", "reduce": "#fc8d62",
           "optimizer": "#ffd92f"}  # fmt: skip
LINES = {"ptd": "#d95f02", "peft": "#7570b3"}
LINE_STYLES = {"best": "--", "compiled": ":"}


def write_bench_report(folder: Path, report: dict[str, Any], sweeps: Sequence[dict[str, Any]] = ()) -> list[Path]:
    """Write a report and its ``sweeps`` as JSON and as plots; return the files. Raises `UserError` if that fails."""
    files = [folder / "bench.json", folder / "bench.png"]
    with writing(folder):
        make_folders(folder)
        write_json(files[0], {**report, **({"sweeps": list(sweeps)} if sweeps else {})})
        plot_phases(report, files[1])
        for each in sweeps:
            files.append(folder / f"{each['key']}.png")
            plot_curve(each["key"], [(float(point["value"]), point["report"]) for point in each["points"]], files[-1])
    return files


def parse_sweep(given: str) -> tuple[str, list[str]]:
    """Parse ``SECTION.KEY=V1,V2`` into the key and its values; raise `UserError` unless all values are numbers."""
    key, _, listed = given.partition("=")
    values = [value.strip() for value in listed.split(",") if value.strip()]
    try:
        list(map(float, values))
    except ValueError as error:
        raise UserError(f"--sweep {given}: {error}; give numbers, because a curve needs them") from error
    if "." not in key or not values:
        raise UserError(f"--sweep {given}: write it as SECTION.KEY=V1,V2, e.g. method.num_virtual_tokens=8,32,128")
    return key, values


def _sides(report: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return lane, side and figures of each side, in the order of the table."""
    return [(lane["name"], side, figures) for lane in report["lanes"] for side, figures in lane["sides"].items()]


def plot_phases(report: dict[str, Any], path: Path) -> None:
    """Plot how each side's step time is divided: milliseconds by phase, one bar per side."""
    pyplot = _pyplot()
    sides = _sides(report)
    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.55 * len(sides)), dpi=150)
    places = list(range(len(sides)))[::-1]
    left = [0.0] * len(sides)
    for phase, colour in COLOURS.items():
        widths = [1000 * figures["phase_seconds"][phase] for _, _, figures in sides]
        axes.barh(places, widths, left=left, label=phase, color=colour, height=0.6)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for place, end, (_, _, figures) in zip(places, left, sides, strict=True):
        axes.text(
            end, place, f" {figures['useful_tokens_per_second']['median']:,.0f} tokens/s", va="center", fontsize=8
        )
    axes.set_yticks(places, [figures["title"] for _, _, figures in sides])
    axes.set(xlabel="milliseconds per step", xlim=(0, 1.25 * max(left)))
    axes.legend(frameon=False, ncols=6, fontsize=7, loc="lower center", bbox_to_anchor=(0.45, 1.0))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def plot_curve(label: str, points: Sequence[tuple[float, dict[str, Any]]], path: Path) -> None:
    """Plot milliseconds per step and useful tokens/s over a setting, one line per side; ``points``: value, report."""
    pyplot = _pyplot()
    figure, (cost, rate) = pyplot.subplots(1, 2, figsize=(9, 3.6), dpi=150)
    curves: dict[tuple[str, str, str], list[tuple[float, float, float]]] = {}
    for value, report in points:
        for lane, side, figures in _sides(report):
            measured = (value, 1000 * figures["step_seconds"], figures["useful_tokens_per_second"]["median"])
            curves.setdefault((lane, side, figures["title"]), []).append(measured)
    for (lane, side, title), found in curves.items():
        values, milliseconds, tokens = zip(*sorted(found), strict=True)
        style = {"color": LINES[side], "linestyle": LINE_STYLES.get(lane, "-"), "marker": "o", "markersize": 4}
        cost.plot(values, milliseconds, label=title, **style)
        rate.plot(values, tokens, **style)
    cost.set(xlabel=label, ylabel="milliseconds per step", ylim=(0, None))
    rate.set(xlabel=label, ylabel="useful tokens/s", ylim=(0, None))
    cost.legend(frameon=False, fontsize=8)
    for axes in (cost, rate):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
