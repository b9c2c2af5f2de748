"""The report of ``benchmarks/quality.py`` on the rows of both sides: OUTPUT.md, OUTPUT.csv and figures.

Any row may be missing.

Each method of a side has on each task one line for its default rate and one for the rate that the development rows
chose out of three. Scores are means over seeds, with the lowest and the highest; costs are means over the seeds on one
machine. A row *diverged* if its held-out loss is higher than that of the frozen backbone, or, for a trained head, which
the frozen backbone lacks, higher than ln 2, the loss of guessing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from quality_jobs import UNTRAINED, labels_by_head
from quality_tasks import TASKS
from rows import read, write_csv

Record = dict[str, Any]
Line = dict[str, Any]
GRID_SIZE = 3
TITLES = {
    "e2e": "E2E: text from facts, causal language model",
    "sst2": "SST-2: sentiment, causal language model",
    "sst2-encoder": "SST-2: sentiment, encoder",
}
SCORES = {"e2e": ("loss", "bleu", "slots"), "sst2": ("accuracy", "loss"), "sst2-encoder": ("accuracy", "loss")}
SHOWN = {
    "loss": "held-out loss, nats",
    "bleu": "BLEU",
    "slots": "slots, %",
    "accuracy": "accuracy, %",
}
DIGITS = {"loss": 3, "bleu": 1, "slots": 1, "accuracy": 1}
COSTS = ("seconds", "tokens_per_second", "peak_memory_bytes")
MEAN_OF = ("loss", "bleu", "slots", "accuracy", *COSTS)
SIDES = {"ptd": "ptd", "peft": "PEFT"}


def place_of(output: Path, side: str) -> Path:
    """Return the file of a side's rows."""
    return output if side == "ptd" else output.with_name(f"{output.stem}_{side}.json")


def read_sides(output: Path) -> tuple[list[Record], dict[str, dict[str, Any]]]:
    """Return the records of both sides, and side -> evidence for the sides that have a file."""
    found = {side: read(place_of(output, side)) for side in SIDES}
    records = [record for of_side, _ in found.values() for record in of_side]
    return records, {side: found_by for side, (_, found_by) in found.items() if found_by}


def of(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Return the measured rows that have these values."""
    return [
        record
        for record in records
        if record["outcome"] == "measured" and all(record.get(key) == value for key, value in wanted.items())
    ]


def chosen_rate(records: Sequence[Record], side: str, method: str, task: str) -> Line | None:
    """Return the best of a grid's three rates on the development rows of seed 0; None until all three have been tried.

    The result has ``rate``, ``learning_rate`` and ``at_edge``: whether a rate outside the grid might be even better. On
    E2E the best rate has the lowest loss; on the other tasks it has the highest accuracy, and among equals the lowest
    loss. A rate that failed is the worst. The default's row counts as one of the three if its rate fits the grid.
    """
    same = [
        record
        for record in records
        if (record["side"], record["method"], record["task"], record["seed"]) == (side, method, task, 0)
    ]
    tried = [record for record in same if record["rate"].startswith("grid") and record["outcome"] != "skipped"]
    rates = [record["learning_rate"] for record in tried if "learning_rate" in record]
    for record in of(same, rate="default"):
        if any(_is_step(record["learning_rate"] / rate) for rate in rates):
            tried.append(record)
    found = [record for record in tried if record["outcome"] == "measured"]
    if len(tried) < GRID_SIZE or not found:
        return None
    best = min(found, key=_development)
    ordered = sorted(record["learning_rate"] for record in found)
    at_edge = len(found) == len(tried) and best["learning_rate"] in (ordered[0], ordered[-1])
    return {"rate": best["rate"], "learning_rate": best["learning_rate"], "at_edge": at_edge}


def _is_step(ratio: float) -> bool:
    """Return whether two rates can be different rates of one grid: one is 3 or 9 times the other."""
    steps = abs(math.log(ratio, 3))
    return abs(steps - round(steps)) < 0.02 and 1 <= round(steps) < GRID_SIZE


def _development(record: Record) -> tuple[float, float]:
    loss = record["development_loss"]
    return -record.get("development_accuracy", 0.0), loss if math.isfinite(loss) else math.inf


def reference_loss(records: Sequence[Record], method: str, task: str) -> float | None:
    """Return the loss above which a row diverged: ln 2 for a trained head, or the frozen backbone's (None: unknown)."""
    if labels_by_head(method, task):
        return math.log(2)
    alone = [record for name in UNTRAINED for record in of(records, method=name, task=task)]
    return float(alone[0]["loss"]) if alone else None


def lines_of(records: Sequence[Record]) -> list[Line]:
    """Return one line per task, side, method and kind of rate (``default``, ``best of grid``), in that order.

    A measured line has ``seeds``; the mean, ``NAME_min`` and ``NAME_max`` of each name in `MEAN_OF` that its rows have;
    the sizes and the rate of its first row; ``frozen_loss``; and ``diverged``, how many of its rows have a higher loss
    than that (None: unknown). A line without a measured row has a ``reason`` instead.
    """
    keys = dict.fromkeys((record["task"], record["side"], record["method"]) for record in records)
    ordered = sorted(keys, key=lambda key: (TASKS.index(key[0]), key[2] not in UNTRAINED))
    lines = []
    for task, side, method in ordered:
        same = {"task": task, "side": side, "method": method}
        lines.append(_line(records, same, "default", "default"))
        best = chosen_rate(records, side, method, task)
        if best is not None:
            line = _line(records, same, best["rate"], "best of grid")
            lines.append(line | {"at_edge": best["at_edge"]})
    lines = [line for line in lines if line]
    machines = machines_of(lines)
    for line in lines:
        if line.get("hardware") in machines and len(machines) > 1:
            line["machine"] = machines[line["hardware"]]
    return lines


def machines_of(lines: Iterable[Line]) -> dict[str, str]:
    """Return machine -> its letter in the tables, for the machines on which the lines' costs were measured."""
    found = dict.fromkeys(line["hardware"] for line in lines if line.get("hardware"))
    return dict(zip(found, ascii_lowercase, strict=False))


def _line(records: Sequence[Record], same: Line, rate: str, kind: str) -> Line:
    measured = of(records, **same, rate=rate)
    line: Line = {**same, "kind": kind, "seeds": len(measured)}
    if not measured:
        others = [each for each in records if each["rate"] == rate and all(each[key] == same[key] for key in same)]
        return line | {"reason": f"{others[0]['outcome']}: {others[0]['reason']}"} if others else {}
    machine = statistics.mode(record.get("hardware") for record in measured)
    timed = [record for record in measured if record.get("hardware") == machine]
    line["hardware"] = machine
    for name in MEAN_OF:
        values = [record[name] for record in (timed if name in COSTS else measured) if record.get(name) is not None]
        if values:
            line |= {name: statistics.fmean(values), f"{name}_min": min(values), f"{name}_max": max(values)}
    first = measured[0]
    line |= {name: first.get(name) for name in ("trained_parameters", "adapter_bytes", "learning_rate")}
    limit = reference_loss(records, same["method"], same["task"])
    line["frozen_loss"], line["diverged"] = limit, None
    if limit is not None and same["method"] not in UNTRAINED:
        line["diverged"] = sum(not record["loss"] <= limit for record in measured)
    failed = [each for each in records if each["outcome"] == "failed" and each["rate"] == rate]
    line["failed"] = sum(all(each[key] == same[key] for key in same) for each in failed)
    return line


def spread(line: Line, name: str) -> str:
    """Return the mean, and for more than one seed also the lowest and the highest value."""
    if name not in line:
        return ""
    digits = DIGITS[name]
    mean, least, most = (f"{line[key]:,.{digits}f}" for key in (name, f"{name}_min", f"{name}_max"))
    return mean if line["seeds"] == 1 else f"{mean} ({least}…{most})"


def size_of(count: int | None) -> str:
    """Return a number of bytes in kB or MB."""
    if not count:
        return "–"
    return f"{count / 1e6:,.2f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def notes_on(line: Line) -> str:
    """Return the notes on a line that a reader needs in addition to its numbers."""
    told = []
    if line["diverged"]:
        told.append(f"{line['diverged']} of {line['seeds']} worse than without training")
    if line.get("at_edge"):
        told.append("at the edge of the grid")
    if line.get("machine"):
        told.append(f"timed on {line['machine']}")
    if line["failed"]:
        told.append(f"{line['failed']} failed")
    return "; ".join(told)


def table(task: str, lines: Sequence[Line]) -> str:
    """Return the task's lines as a Markdown table."""
    heads = ["side", "method", "rate", *(SHOWN[name] for name in SCORES[task])]
    heads += ["trained parameters", "adapter", "training, s", "useful tokens/s", "peak memory", "seeds", "notes"]
    body = []
    for line in lines:
        name = [SIDES[line["side"]], line["method"]]
        if not line["seeds"]:
            body.append([*name, line["kind"], line["reason"], *[""] * (len(heads) - 4)])
            continue
        rate = "–" if line["learning_rate"] is None else f"{line['learning_rate']:.2g} ({line['kind']})"
        peak = line.get("peak_memory_bytes")
        costs = [f"{line[name]:,.0f}" if name in line else "–" for name in COSTS[:2]]
        costs.append("–" if peak is None else f"{peak / 1e6:,.0f} MB")
        sizes = [f"{line['trained_parameters']:,}", size_of(line["adapter_bytes"])]
        scores = [spread(line, score) for score in SCORES[task]]
        body.append([*name, rate, *scores, *sizes, *costs, str(line["seeds"]), notes_on(line)])
    ruled = [heads, ["---"] * len(heads), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/').strip() for cell in row)} |" for row in ruled)


def leaderboard(lines: Sequence[Line]) -> list[Line]:
    """Return the lines of the causal model on E2E, best first: ``side``, ``method``, ``kind``, ``learning_rate``,
    ``loss`` with its lowest and highest value, ``seconds`` of training, ``trained_parameters`` and ``seeds``."""
    wanted = ("side", "method", "kind", "learning_rate", "loss", "loss_min", "loss_max", "seconds")
    wanted += ("trained_parameters", "seeds")
    found = [line for line in lines if line["task"] == "e2e" and line["seeds"] and line["method"] not in UNTRAINED]
    ordered = sorted(found, key=lambda line: line["loss"] if math.isfinite(line["loss"]) else math.inf)
    return [{name: line.get(name) for name in wanted} for line in ordered]


def _leaderboard_table(lines: Sequence[Line]) -> str:
    rows = [
        ["place", "side", "method", "rate", "held-out loss, nats", "training, s", "parameters", "seeds"],
        ["---"] * 8,
    ]
    for place, line in enumerate(leaderboard(lines), 1):
        rate = f"{line['learning_rate']:.2g} ({line['kind']})"
        costs = [f"{line['seconds']:.0f}", f"{line['trained_parameters']:,}", str(line["seeds"])]
        rows.append([str(place), SIDES[line["side"]], line["method"], rate, spread(line, "loss"), *costs])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def markdown(records: Sequence[Record], found_by: dict[str, dict[str, Any]]) -> str:
    """Return the whole page, with a warning if the sides' settings differ; ``found_by``: side -> evidence."""
    lines = lines_of(records)
    counts = {outcome: sum(record["outcome"] == outcome for record in records) for outcome in ("failed", "skipped")}
    settings: dict[str, Any] = {}
    parts = ["# Held-out quality"]
    for side, each in found_by.items():
        parts.append(f"{SIDES[side]}: `{each.get('command')}` at commit {each.get('commit')}, {each.get('date')}.")
        known = each.get("settings", {})
        other = [name for name, value in known.items() if settings.get(name, value) != value]
        if other:
            parts.append(f"**The sides are not comparable**: they differ in {', '.join(other)}.")
        settings = {**known, **settings}
    if settings:
        parts.append(", ".join(f"{name}: {value}" for name, value in settings.items()) + ".")
    machines = machines_of(lines)
    named = [f"{letter}: {machine}" for machine, letter in machines.items()]
    parts += [f"Times on {'; '.join(named if len(machines) > 1 else machines)}."] if machines else []
    parts += [
        f"{len(records)} rows: {counts['failed']} failed, {counts['skipped']} skipped. "
        "Scores are means over seeds (lowest…highest).",
    ]
    for task in TASKS:
        of_task = [line for line in lines if line["task"] == task]
        if not of_task:
            continue
        parts += [f"## {TITLES[task]}", table(task, of_task)]
        people = of(records, task=task, method="frozen")
        if people and "slots_of_references" in people[0]:
            parts.append(
                f"Human references for these meaning representations: slots {people[0]['slots_of_references']:.1f} %."
            )
        counts_of_tokens = {each["supervised_tokens"] for each in of(records, task=task) if "supervised_tokens" in each}
        if len(counts_of_tokens) > 1:
            parts.append(f"**The losses are not comparable**: they are over {sorted(counts_of_tokens)} tokens.")
    if leaderboard(lines):
        steps, rows = settings.get("steps"), settings.get("rows of a step")
        parts += [f"## E2E after {steps} steps of {rows} rows", _leaderboard_table(lines)]
    return "\n\n".join(parts) + "\n"


def report(output: Path, *, plots: bool = False) -> None:
    """Write OUTPUT.md, OUTPUT.csv and, with ``plots``, one figure per task next to OUTPUT; print the page."""
    records, found_by = read_sides(output)
    page, lines = markdown(records, found_by), lines_of(records)
    print(page)
    output.with_suffix(".md").write_text(page, encoding="utf-8")
    write_csv(output.with_suffix(".csv"), lines, digits=6)
    if plots:
        for task in TASKS:
            draw(output.with_name(f"{output.stem}_{task}.png"), task, records, lines)


COLOURS = {"ptd": "#d62728", "PEFT": "#1f77b4", "LoRA": "#555555"}
LABELS_AT: dict[str, dict[str, Any]] = {
    "ptd": {"xytext": (-6, -3), "ha": "right"},
    "PEFT": {"xytext": (6, -3), "ha": "left"},
    "LoRA": {"xytext": (0, -13), "ha": "center"},
}
"""Where a point's label is placed: points of two sides often coincide."""


def _series(line: Line) -> str:
    return "LoRA" if line["method"].startswith("lora") else SIDES[line["side"]]


def draw(file: Path, task: str, records: Sequence[Record], lines: Sequence[Line]) -> None:
    """Draw loss (E2E) or accuracy over trained parameters, one panel per kind of rate; without rows, draw nothing."""
    measured = [line for line in lines if line["task"] == task and line["seeds"]]
    trained = [line for line in measured if line["method"] not in UNTRAINED and line["trained_parameters"]]
    if not trained:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    score = SCORES[task][0]
    kinds = [kind for kind in ("default", "best of grid") if any(line["kind"] == kind for line in trained)]
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(6.2 * len(kinds), 5.2), dpi=130, squeeze=False, sharey=True
    )
    alone = [line[score] for line in measured if line["method"] in UNTRAINED]
    for kind, axes in zip(kinds, panels[0], strict=True):
        for series, colour in COLOURS.items():
            points = [line for line in trained if line["kind"] == kind and _series(line) == series]
            points.sort(key=lambda line: line["trained_parameters"])
            if points:
                _draw_series(axes, points, score, series, colour)
        if alone:
            axes.axhline(alone[0], color="black", linestyle="--", linewidth=1)
            where = {"xy": (0.01, alone[0]), "xycoords": ("axes fraction", "data")}
            axes.annotate("frozen backbone", **where, xytext=(0, 3), textcoords="offset points", fontsize=8)
        axes.set_xscale("log")
        axes.margins(x=0.16)
        title = "default rates" if kind == "default" else "best of three rates"
        axes.set(title=title, xlabel="trained parameters", ylabel=f"{SHOWN[score]} (test)")
        axes.grid(alpha=0.3)
    _limit(panels[0], trained, score, alone)
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{TITLES[task]} (mean, lowest and highest over seeds)", fontsize=10)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def _draw_series(axes: Any, points: Sequence[Line], score: str, series: str, colour: str) -> None:
    values = [line[score] for line in points]
    errors = [
        [line[score] - line[f"{score}_min"] for line in points],
        [line[f"{score}_max"] - line[score] for line in points],
    ]
    axes.errorbar(
        [line["trained_parameters"] for line in points], values, yerr=errors, color=colour, capsize=2, markersize=5,
        marker="s" if series == "LoRA" else "o", linestyle="-" if series == "LoRA" else "none", label=series,
    )  # fmt: skip
    place = LABELS_AT[series]
    for line, value in zip(points, values, strict=True):
        axes.annotate(
            line["method"].removeprefix("lora "), (line["trained_parameters"], value), textcoords="offset points",
            fontsize=7.5, color=colour, annotation_clip=True, **place,
        )  # fmt: skip


def _limit(panels: Sequence[Any], trained: Sequence[Line], score: str, alone: Sequence[float]) -> None:
    """Cut the loss axis far above the frozen backbone's loss, and name the points above the cut."""
    if score != "loss" or not alone:
        return
    top = 1.15 * alone[0]
    beyond = [line for line in trained if not line[score] <= top]
    if not beyond:
        return
    low = min((line[f"{score}_min"] for line in trained if line[score] <= top), default=0.0)
    panels[0].set_ylim(low - 0.05 * (top - low), top)
    for axes, kind in zip(panels, ("default", "best of grid"), strict=False):
        names = [f"{SIDES[line['side']]} {line['method']} {line[score]:.2f}" for line in beyond if line["kind"] == kind]
        if names:
            axes.text(
                0.99, 0.99, "not shown: " + ", ".join(names), transform=axes.transAxes, ha="right", va="top", fontsize=7
            )
