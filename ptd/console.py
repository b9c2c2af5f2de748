"""How progress looks: bars in a terminal, plain lines anywhere else. Both go to stderr; stdout is for results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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

LABELS = {"train": "training", "eval": "evaluating", "generate": "generating"}


def make_reporter() -> Reporter:
    """Bars if stderr is a terminal, else lines."""
    return BarReporter() if sys.stderr.isatty() else LineReporter()


class LineReporter(Reporter):
    """One line whenever there is something to say."""

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
    """A bar a task, with the lines above it."""

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


COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def print_checks(checks: Sequence[Any], attention: dict[str, Any]) -> None:
    """A table of checks (``name``, ``status``, ``found``, ``advice``), and one of what attention would run on."""
    console = Console(highlight=False)
    table = Table("check", "", "found", box=None, pad_edge=False, show_header=False)
    for check in checks:
        found = Text(check.found + (f"\n{check.advice}" if check.advice else ""))
        table.add_row(check.name, Text(check.status, COLOURS[check.status]), found)
    console.print(table)
    console.print(f"\nattention with a prefix, {attention['dtype']}, heads of {attention['head_dim']}:")
    for batch, backends in attention["backends"].items():
        table = Table("backend", "reason", box=None, pad_edge=False, show_header=False)
        for backend, reason in backends.items():
            table.add_row(Text(f"  {backend}"), Text(reason))
        console.print(Text(f"\n{batch}"))
        console.print(table)
