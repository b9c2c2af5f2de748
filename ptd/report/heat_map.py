"""A heat map of the runs of a sweep over two of their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DARKEST = 60
"""Share of the colour, in percent, behind the best value; the worst value has none."""


@dataclass(frozen=True)
class HeatCell:
    """``text``: the value as shown; ``shade``: share of the colour behind it, in percent; ``best``: of all cells."""

    text: str
    shade: int
    best: bool


@dataclass(frozen=True)
class HeatMap:
    """``values`` by row and column; ``rows`` and ``columns`` are values of the settings ``row_key``, ``column_key``."""

    metric: str
    row_key: str
    column_key: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[HeatCell, ...], ...]
    note: str


def heat_map(metric: str, cells: Sequence[Mapping[str, Any]], *, lower_is_better: bool) -> HeatMap | None:
    """Return the map of a sweep's runs over its first two settings; None if fewer than two settings vary.

    ``cells`` are those of sweep.json. Of several runs in one place (further settings vary), the best counts. The shades
    are by rank, because one run that has diverged would leave all others alike.
    """
    keys = list(cells[0]["changes"])
    if len(keys) < 2:
        return None
    row_key, column_key = keys[:2]
    rows, columns = (tuple(dict.fromkeys(str(cell["changes"][key]) for cell in cells)) for key in (row_key, column_key))
    found: dict[tuple[str, str], float] = {}
    sign = 1 if lower_is_better else -1
    for cell in cells:
        place = str(cell["changes"][row_key]), str(cell["changes"][column_key])
        value = cell["value"]
        if value is not None and (place not in found or sign * value < sign * found[place]):
            found[place] = value
    order = sorted(set(found.values()), key=lambda value: sign * value)

    def shown(place: tuple[str, str]) -> HeatCell:
        if place not in found:
            return HeatCell("–", 0, False)
        rank = order.index(found[place])
        shade = round(DARKEST * (1 - rank / max(1, len(order) - 1)))
        return HeatCell(f"{found[place]:.4g}", shade, rank == 0)

    note = "Darker is better, by rank; the best value is bold."
    if len(keys) > 2:
        note += f" Each place shows the best run over {' and '.join(keys[2:])}."
    values = tuple(tuple(shown((row, column)) for column in columns) for row in rows)
    return HeatMap(metric, row_key, column_key, rows, columns, values, note)
