"""A reporter that stores its notes and can stop a run.

``from reporting import …`` works in every test (tests/conftest.py registers this file under that name).
"""

from __future__ import annotations

from ptd.types import Reporter


class Stopped(Exception):
    """Raised to stop the run."""


class Notes(Reporter):
    """Store the notes, and stop the run after the record of step ``stop``, before anything else happens."""

    def __init__(self, stop: int | None = None) -> None:
        self.lines: list[str] = []
        self.stop = stop

    def note(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, task: str, done: int, line: str | None = None) -> None:
        if task == "train" and done == self.stop:
            raise Stopped
