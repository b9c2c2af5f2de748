"""A reporter that keeps what it is told, and can tear a run down.

``from reporting import …`` works in every test (tests/conftest.py registers this file under that name).
"""

from __future__ import annotations

from ptd.types import Reporter


class Stopped(Exception):
    """The run is torn down here."""


class Notes(Reporter):
    """Keeps what is said; stops the run before the record of step ``stop`` is followed by anything."""

    def __init__(self, stop: int | None = None) -> None:
        self.lines: list[str] = []
        self.stop = stop

    def note(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, task: str, done: int, line: str | None = None) -> None:
        if task == "train" and done == self.stop:
            raise Stopped
