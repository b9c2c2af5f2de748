"""Turn runs into panels: choose which curves are drawn together, and in which units."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ptd.engine.phases import OTHER
from ptd.report.data import Record, RecordedRun, is_number

STEP = "optimizer step"
ALONE = "frozen backbone"
NOT_DRAWN = ("eval_loss", "eval_supervised_tokens", "eval_rows")
"""Entries of an evaluation that have their own panel or are not metrics."""
PERCENT = {"accuracy", "macro_f1", "mcc", "precision", "recall", "f1", "exact_match"}
"""Metrics of the tasks whose best value is 100."""
LONGEST = 20
"""Letters of a metric's name that fit on an axis."""
SPREAD = 30.0
"""Ratio of the largest to the median value above which an axis is logarithmic."""

SPLIT = ("phases", "Where a step's time goes", "seconds per step, rank 0")
"""Name, title and unit of the panel that shows what a step's time is spent on."""
LAYERS = {"data": 4, "encoder": 2, "forward": 0, "backward": 1, "reduce": 3, "optimizer": 5, OTHER: -1}
"""The phases of a step, and their places in the palette (−1: none of its colours)."""
PARTS = 150
"""Longer series of layers are drawn as means over this number of parts."""
TALL = 3.0
"""Values above this multiple of the median are cut off, because one slow step would flatten all others."""


@dataclass(frozen=True)
class Curve:
    """``y`` over ``x``; NaN is a gap. ``colour``: place in the palette (−1: none of its colours); ``dashed``, ``dots``:
    how the curve is drawn. A curve without a ``label`` is not in the legend."""

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over one pair of axes. ``name`` is valid as a file name; ``marks`` are steps, ``alarms`` are steps with a
    word; ``note`` is the text below the panel.

    ``layers``: the curves are stacked, and cut off at ``top``; with ``bars``, their ``x`` are these runs, not steps.
    """

    name: str
    title: str
    unit: str
    curves: tuple[Curve, ...]
    from_zero: bool = False
    logarithmic: bool = False
    marks: tuple[int, ...] = ()
    alarms: tuple[tuple[int, str], ...] = ()
    note: str = ""
    layers: bool = False
    bars: tuple[str, ...] = ()
    top: float | None = None


@dataclass(frozen=True)
class _Kind:
    """A panel of records: ``main`` is drawn as full lines, ``other`` as dashed lines (each: label, key of the records).

    Values are divided by ``divisor``.
    """

    name: str
    title: str
    unit: str
    main: tuple[str, str]
    other: tuple[str, str] | None = None
    divisor: float = 1.0
    from_zero: bool = True
    note: str = ""


_KINDS = (
    _Kind("learning_rate", "Learning rate", "learning rate (no unit)", ("learning rate", "lr")),
    _Kind("grad_norm", "Gradient norm", "norm before clipping (no unit)", ("norm", "grad_norm"), from_zero=False),
    _Kind("loss_scale", "Loss scale (float16)", "loss scale (no unit)", ("loss scale", "loss_scale"), from_zero=False),
    _Kind("throughput", "Useful tokens", "tokens/s, all ranks", ("tokens", "tokens_per_second"),
          note="Padding does not count."),
    _Kind("step_time", "Time per step", "seconds", ("whole step", "step_seconds"),
          ("slowest rank's own part", "slowest_rank_seconds"),
          note="A rank's own part is data, forward and backward; the rest is reductions, optimizer and waiting."),
    _Kind("memory", "Peak memory", "GiB, rank 0", ("peak so far", "peak_memory_bytes"), divisor=2**30,
          note="Memory of the GPU's allocator; on a CPU, of the whole process."),
    _Kind("network", "Network", "MB per step, all ranks",
          ("inside nodes", "inside"), ("between nodes", "between"), 1e6),
)  # fmt: skip


def panels(runs: Sequence[RecordedRun]) -> list[Panel]:
    """Return all panels that the runs have numbers for."""
    found = [*_loss(runs)]
    records = [[_with_places(record) for record in run.steps] for run in runs]
    found += [_panel(kind, runs, records) for kind in _KINDS]
    for key in metrics(runs):
        metric = key.removeprefix("eval_")
        short = metric if len(metric) <= LONGEST else f"{metric[: LONGEST - 1]}…"
        unit = f"{short} ({'%' if metric in PERCENT else 'no unit'})"
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", key)
        kind = _Kind(name, f"Held-out {metric}", unit, (metric, key), from_zero=False)
        found.append(_with_alone(_panel(kind, runs, [run.evaluations for run in runs], dots=True), runs, key))
    found.append(_split(runs))
    return [panel for panel in found if panel.curves]


def metrics(runs: Sequence[RecordedRun]) -> list[str]:
    """Return the names, in the records, of the metrics that the evaluations measured in addition to the loss."""
    names = {key: None for run in runs for record in run.evaluations for key in record if key.startswith("eval_")}
    return [name for name in names if name not in NOT_DRAWN]


def _split(runs: Sequence[RecordedRun]) -> Panel:
    """Return the panel of what a step's time is spent on, for the runs whose records have it."""
    return _over_steps(runs[0]) if len(runs) == 1 else _by_run(runs)


def mean_split(run: RecordedRun) -> dict[str, float]:
    """Return the mean seconds per step of each phase, over the records that have them; empty if none has."""
    found = [record["phase_seconds"] for record in _divided(run)]
    return {name: float(np.mean([each[name] for each in found])) for name in LAYERS} if found else {}


def _divided(run: RecordedRun) -> list[Record]:
    return [record for record in run.steps if _is_split(record.get("phase_seconds"))]


def _is_split(value: Any) -> bool:
    return isinstance(value, dict) and all(is_number(value.get(name)) for name in LAYERS)


def _over_steps(run: RecordedRun) -> Panel:
    records = _divided(run)
    if not records:
        return _layers([])
    parts = np.array_split(np.arange(len(records)), min(PARTS, len(records)))
    last = np.array([records[part[-1]]["step"] for part in parts], dtype=float)
    first = max(0.0, 2 * last[0] - last[1]) if len(last) > 1 else last[0] - 1
    layers = []
    for name in LAYERS:
        seconds = np.array([record["phase_seconds"][name] for record in records], dtype=float)
        means = np.array([seconds[part].mean() for part in parts])
        layers.append(_layer(name, np.append(first, last), np.append(means[0], means)))
    total = np.sum([layer.y for layer in layers], axis=0)
    limit = TALL * float(np.median(total))
    top, notes = None, []
    if total.max() > limit > 0:
        top = 1.15 * float(total[total <= limit].max())
        notes.append(f"Cut off at the top; the highest value is {total.max():.3g} s.")
    if len(records) > PARTS:
        notes.append(f"Means over {PARTS} parts of the run.")
    return _layers(layers, top=top, note=" ".join(notes))


def _by_run(runs: Sequence[RecordedRun]) -> Panel:
    means = [mean_split(run) for run in runs]
    places = np.arange(len(runs), dtype=float)
    layers = [_layer(name, places, np.array([each.get(name, 0.0) for each in means], dtype=float)) for name in LAYERS]
    without = [run.name for run, each in zip(runs, means, strict=True) if not each]
    note = f"Means over the records. Not recorded: {', '.join(without)}." if without else "Means over the records."
    return _layers(layers, bars=tuple(run.name for run in runs), note=note)


def _layer(name: str, x: np.ndarray, y: np.ndarray) -> Curve:
    return Curve(name, x, y, LAYERS[name])


def _layers(layers: Sequence[Curve], **more: Any) -> Panel:
    return Panel(*SPLIT, tuple(layer for layer in layers if layer.y.any()), from_zero=True, layers=True, **more)


def _loss(runs: Sequence[RecordedRun]) -> list[Panel]:
    training = [_curve(run.name, run.steps, "loss", colour) for colour, run in enumerate(runs)]
    colours = range(1, 2) if len(runs) == 1 else range(len(runs))
    held_out = [
        _curve(run.name, run.evaluations, "eval_loss", colour, dots=True)
        for colour, run in zip(colours, runs, strict=True)
    ]
    unit = "loss (nats)"
    if len(runs) > 1:
        return [
            _axes("loss", "Training loss", unit, training),
            _with_alone(_axes("eval_loss", "Held-out loss", unit, held_out), runs, "eval_loss"),
        ]
    both = [
        Curve(label, curve.x, curve.y, curve.colour, dots=curve.dots)
        for label, curve in zip(("training", "held-out rows"), [*training, *held_out], strict=True)
    ]
    panel = _with_alone(_axes("loss", "Loss", unit, [curve for curve in both if len(curve.x)]), runs, "eval_loss")
    starts = [attempt.get("from_step") for attempt in runs[0].attempts[1:]]
    marks = tuple(sorted({start for start in starts if isinstance(start, int) and start > 0}))
    note = "Vertical lines: steps from which the run was continued." if marks else ""
    step = runs[0].section("diverged").get("step")
    alarms = ((step, "diverged"),) if isinstance(step, int) else ()
    return [replace(panel, marks=marks, alarms=alarms, note=note)]


def _with_alone(panel: Panel, runs: Sequence[RecordedRun], key: str) -> Panel:
    """Return ``panel`` with a dashed line for the frozen backbone, in the colour of the held-out rows or of the run."""
    levels = {number: run.alone[key] for number, run in enumerate(runs) if is_number(run.alone.get(key))}
    if not levels or not panel.curves:
        return panel
    last = max([*(curve.x[-1] for curve in panel.curves), 1.0])

    def line(level: float, colour: int, label: str) -> Curve:
        return Curve(label, np.array([0.0, last]), np.full(2, level, dtype=float), colour, dashed=True)

    if len(runs) == 1:
        lines = [line(levels[0], 1 if panel.name == "loss" else 0, ALONE)]
    elif len(set(levels.values())) == 1:
        lines = [line(next(iter(levels.values())), -1, ALONE)]
    else:
        lines = [line(level, number, "") for number, level in levels.items()]
    note = f"{panel.note} Dashed: the {ALONE}.".strip() if len(runs) > 1 else panel.note
    found = _axes(panel.name, panel.title, panel.unit, [*panel.curves, *lines], from_zero=panel.from_zero)
    return replace(found, note=note)


def _panel(kind: _Kind, runs: Sequence[RecordedRun], records: Sequence[Sequence[Record]], dots: bool = False) -> Panel:
    curves = []
    for colour, (run, own) in enumerate(zip(runs, records, strict=True)):
        pairs = [pair for pair in (kind.main, kind.other) if pair is not None]
        for number, (label, key) in enumerate(pairs):
            shade = colour if len(runs) > 1 else number
            label = label if len(runs) == 1 else run.name
            curves.append(_curve(label, own, key, shade, kind.divisor, dashed=number == 1, dots=dots))
    panel = _axes(kind.name, kind.title, kind.unit, curves, from_zero=kind.from_zero)
    said = kind.note
    if len(runs) > 1 and kind.other is not None and any(curve.dashed for curve in panel.curves):
        said = f"Full lines: {kind.main[0]}; dashed lines: {kind.other[0]}. {said}".strip()
    return replace(panel, note=said)


def _axes(name: str, title: str, unit: str, curves: Sequence[Curve], *, from_zero: bool = False) -> Panel:
    drawn = tuple(curve for curve in curves if np.isfinite(curve.y).any())
    values = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in drawn]) if drawn else np.zeros(1)
    spread = not from_zero and values.min() > 0 and values.max() > SPREAD * np.median(values)
    return Panel(name, title, unit, drawn, from_zero, bool(spread))


def _curve(
    label: str,
    records: Sequence[Record],
    key: str,
    colour: int,
    divisor: float = 1.0,
    *,
    dashed: bool = False,
    dots: bool = False,
) -> Curve:
    given = [record for record in records if key in record]
    values = [record[key] / divisor if is_number(record[key]) else np.nan for record in given]
    steps = np.array([record["step"] for record in given], dtype=float)
    return Curve(label, steps, np.array(values, dtype=float), colour, dashed, dots)


def _with_places(record: Record) -> Record:
    total, between = record.get("network_bytes"), record.get("network_bytes_between_nodes")
    if not is_number(total) or not is_number(between) or not total:
        return record
    return {**record, "inside": total - between, "between": between}


def thin(x: np.ndarray, y: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and the largest value in each of ``columns`` equal parts of the axis, in the order of ``x``.

    That is as much as so many pixels can show. ``x`` ascends; a part without a finite value keeps one NaN.
    """
    if len(x) <= 2 * columns:
        return x, y
    width = (x[-1] - x[0]) / columns or 1.0
    column = np.minimum(((x - x[0]) / width).astype(int), columns - 1)
    order = np.lexsort((y, column))  # NaN comes last in its column
    starts = np.flatnonzero(np.diff(column[order], prepend=-1))
    ends = np.append(starts[1:], len(order))
    finite = np.add.reduceat(np.isfinite(y[order]).astype(int), starts)
    largest = starts + np.maximum(finite, 1) - 1
    assert (largest < ends).all()
    kept = np.unique(np.concatenate([order[starts], order[largest]]))
    return x[kept], y[kept]
