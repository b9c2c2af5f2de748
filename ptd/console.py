"""Show progress on stderr (bars in a terminal, otherwise plain lines), and print the verbs' tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ptd.types import Reporter
from ptd.values import decimal_size, memory_size

LABELS = {
    "train": "training",
    "eval": "evaluating",
    "generate": "generating",
    "inspect": "inspecting",
    "bench": "timing",
}


def make_reporter() -> Reporter:
    """Return a reporter of bars if stderr is a terminal, otherwise of lines."""
    return BarReporter() if sys.stderr.isatty() else LineReporter()


class LineReporter(Reporter):
    """Prints notes and progress as plain lines."""

    def __init__(self) -> None:
        self._totals: dict[str, int] = {}

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def start(self, task: str, total: int, done: int = 0) -> None:
        self._totals[task] = total

    def advance(self, task: str, done: int, line: str | None = None) -> None:
        if line is not None:
            self.note(f"{task} {done}/{self._totals[task]}  {line}")


class BarReporter(Reporter):
    """Shows one bar per task, and prints lines above the bars."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._totals: dict[str, int] = {}

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def start(self, task: str, total: int, done: int = 0) -> None:
        self._totals[task] = total
        self._tasks[task] = self._progress.add_task(LABELS.get(task, task), total=total, completed=done)
        self._progress.start()

    def advance(self, task: str, done: int, line: str | None = None) -> None:
        self._progress.update(self._tasks[task], completed=done)
        if line is not None:
            self.note(f"{task} {done}/{self._totals[task]}  {line}")

    def finish(self, task: str) -> None:
        self._progress.remove_task(self._tasks.pop(task))
        if not self._tasks:
            self._progress.stop()


def _console() -> Console:
    """Return a console on stdout, as wide as the terminal; 120 columns for a file or pipe, where rich omits colours."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def print_checks(checks: Sequence[Any], attention: dict[str, Any]) -> None:
    """Print a table of checks (``name``, ``status``, ``found``, ``advice``), and tables of the attention backends."""
    console = _console()
    table = Table("check", "", "found", box=None, pad_edge=False, show_header=False)
    for check in checks:
        found = Text(check.found + (f"\n{check.advice}" if check.advice else ""))
        table.add_row(check.name, Text(check.status, COLOURS[check.status]), found)
    console.print(table)
    console.print(f"\nattention with a prefix, {attention['dtype']}, head size {attention['head_dim']}:")
    for batch, backends in attention["backends"].items():
        table = Table("backend", "reason", box=None, pad_edge=False, show_header=False)
        for backend, reason in backends.items():
            table.add_row(Text(f"  {backend}"), Text(reason))
        console.print(Text(f"\n{batch}"))
        console.print(table)


def print_plan(found: dict[str, Any]) -> None:
    """Print the tables of ``ptd plan``, from `ptd.commands.plan.Plan.to_dict`."""
    console = _console()
    placements = found["placements"]
    shown = [each for each in placements if each["own"] or each["name"] == found["best"]]
    head = (
        f"{found['backbone_parameters'] / 1e9:.2f} B frozen and {found['trained_parameters']:,} trained parameters; "
        f"{found['nodes']} × {found['ranks_per_node']} ranks with {memory_size(found['memory_bytes_per_rank'])} each, "
        f"of which a step may use {memory_size(found['usable_bytes_per_rank'])}; micro-batch of "
        f"{found['micro_batch_rows']} rows, {found['micro_batch_tokens']:,} tokens; "
        f"{found['flops_per_token'] / 1e9:.3g} GFLOP per token"
    )
    console.print(head, soft_wrap=True)
    items = Table(title="Peak memory of one rank during a step", title_justify="left")
    items.add_column("")
    for each in shown:
        items.add_column(each["name"] + (" (this run)" if each["own"] else ""), justify="right")
    for name in shown[0]["items"]:
        items.add_row(name.replace("_", " "), *(memory_size(each["items"][name]) for each in shown))
    items.add_row("total", *(memory_size(each["peak_bytes"]) for each in shown))
    items.add_row("host memory", *(memory_size(each["host_bytes"]) for each in shown))
    console.print(items)
    table = Table(title="Placements of the frozen weights, lowest cost per token first", title_justify="left")
    for column in ("placement", "peak per rank", "fits", "largest micro-batch", "sent in the node per rank and step",
                   "sent between nodes per node and step", "relative cost per token"):  # fmt: skip
        table.add_column(column, justify="left" if column == "placement" else "right")
    cheapest = placements[0]["estimated_seconds_per_token"]
    for each in placements:
        rows = each["largest_micro_batch_rows"]
        table.add_row(
            each["name"] + (" (this run)" if each["own"] else ""),
            memory_size(each["peak_bytes"]),
            "yes" if each["fits"] else "no",
            f"{rows:,} rows" if rows < 1 << 20 else "any",
            decimal_size(each["bytes_sent_inside_node_per_rank_and_step"]),
            decimal_size(each["bytes_sent_between_nodes_per_node_and_step"]),
            f"{each['estimated_seconds_per_token'] / cheapest:.2f} ×",
        )
    console.print(table)
    console.print(f"best: {found['reason']}" if found["best"] else found["reason"], soft_wrap=True)
    for line in found["assumptions"]:
        console.print(f"assumed: {line}", soft_wrap=True)


def _counted(show: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    return lambda figures: "not counted" if figures["flops_per_second"] is None else show(figures)


_BENCH_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "useful tokens/s": lambda figures: f"{figures['useful_tokens_per_second']['median']:,.0f}",
    "supervised tokens/s": lambda figures: f"{figures['supervised_tokens_per_second']['median']:,.0f}",
    "padding": lambda figures: f"{figures['padding_share']:.0%}",
    "TFLOP/s": _counted(lambda figures: f"{figures['flops_per_second'] / 1e12:.3g}"),
    "  of the matmul rate": _counted(lambda figures: f"{figures['share_of_matmul_rate']:.0%}"),
    "peak memory": lambda figures: memory_size(figures["peak_memory_bytes"]),
}


def print_bench(found: dict[str, Any], heading: str | None = None) -> None:
    """Print the tables of ``ptd bench``, from the result of `ptd.bench.bench`."""
    console = Console(highlight=False)
    machine = found["machine"]
    sides = [(lane, figures) for lane in found["lanes"] for figures in lane["sides"].values()]
    rate = f"{machine['flops_per_second'] / 1e12:.3g} TFLOP/s in a matmul of {machine['size']} × {machine['size']}"
    threads = "" if machine["threads"] is None else f", {machine['threads']} threads"
    what = f"{found['hardware']}{threads}, {found['dtype']}: {rate}; {found['repeats']} steps per side, alternating"
    console.print(Text(what if heading is None else f"{heading}: {what}"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", *(figures["title"] for _, figures in sides)):
        table.add_column(column, justify="right" if column else "left")
    for label, value in _BENCH_ROWS.items():
        table.add_row(label, *(value(figures) for _, figures in sides))
    ratios = [lane.get("ratio") if figures is lane["sides"]["ptd"] else None for lane, figures in sides]
    if any(ratios):
        shown = ["" if each is None else f"{each['median']:.2f} ×" for each in ratios]
        spread = ["" if each is None else "{:.2f}–{:.2f}".format(*each["quartiles"]) for each in ratios]
        table.add_row("ptd / PEFT, median of pairs", *shown)
        table.add_row("  quartiles", *spread)
    for phase in sides[0][1]["phase_seconds"]:
        table.add_row(f"ms per step: {phase}", *(f"{1000 * each['phase_seconds'][phase]:.1f}" for _, each in sides))
    table.add_row("  total", *(f"{1000 * figures['step_seconds']:.1f}" for _, figures in sides))
    console.print(table)
    sent, between = found["network"]["network_bytes"], found["network"]["network_bytes_between_nodes"]
    if sent:
        part = f"of which between nodes: {decimal_size(between)}"
        console.print(f"network traffic of all ranks per step: {decimal_size(sent)}, {part}")


MOST_ROWS = 40
"""Maximum number of rows that are printed of a table."""


def print_inspection(head: str, notes: Sequence[str], sections: Sequence[Any]) -> None:
    """Print the result of ``ptd inspect``. Each section has ``title``, ``text``, ``columns`` and ``rows``."""
    console = _console()
    console.print(Text(head), soft_wrap=True)
    for section in sections:
        console.print(Text(f"\n{section.title}", style="bold"))
        console.print(Text(section.text, style="dim"), soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        for number, column in enumerate(section.columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in section.rows[:MOST_ROWS]:
            table.add_row(*map(Text, row))
        console.print(table)
        if len(section.rows) > MOST_ROWS:
            console.print(f"… and {len(section.rows) - MOST_ROWS} more rows in inspect.json")
    for note in notes:
        console.print(Text(f"\nnote: {note}"), soft_wrap=True)


def print_sweep(found: dict[str, Any]) -> None:
    """Print the runs of a sweep on stderr, best first."""
    metric, cells = found["metric"], found["cells"]
    keys = list(cells[0]["changes"])
    table = Table(*[key.rpartition(".")[2] for key in keys], metric, "after step", "", box=None, pad_edge=False)
    best = found["best"]["name"] if found["best"] else None
    place = {name: index for index, name in enumerate(found["ranking"])}
    for cell in sorted(cells, key=lambda cell: place.get(cell["name"], len(place))):
        shown = "–" if cell["value"] is None else f"{cell['value']:.4f}"
        state = "" if cell["status"] == "finished" else str(cell["status"])
        if cell["dropped_after"] is not None:
            state = f"dropped after step {cell['dropped_after']}"
        if cell["name"] == best:
            state = "best"
        step = "–" if cell["step"] is None else str(cell["step"])
        table.add_row(*[str(cell["changes"][key]) for key in keys], shown, step, state)
    Console(stderr=True).print(table)
