"""Send the records of a run to trackers: TensorBoard, Weights & Biases, MLflow. Each tracker is one module.

A tracker never stops a run: if it fails, the run drops it, says so once, and continues.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

T = TypeVar("T")
Status = Literal["finished", "preempted", "failed"]
Note = Callable[[str], None]

LOCAL = ("tensorboard",)
"""Trackers that only write files; the others may have to wait for a server, so each of them runs in a thread."""
PATIENCE: dict[Status, float] = {"finished": 60.0, "preempted": 5.0, "failed": 5.0}
"""Seconds that a tracker gets to send its remaining records, by how the run ended."""


@dataclass(frozen=True)
class Tracked:
    """A run as its trackers know it. All starts of the run have the same ``id``; this one begins after ``after_step``.

    For the trackers, a retry after a divergence, with another learning rate, is another run; ``again`` is its number.
    """

    folder: Path
    name: str
    id: str
    config: dict[str, Any]
    after_step: int = 0
    again: int = 0

    @classmethod
    def of(
        cls, folder: Path, started: str, name: str | None, config: dict[str, Any], after_step: int, again: int = 0
    ) -> Tracked:
        """Return the run in ``folder``. ``started``: when its first start began."""
        place = folder.resolve()
        words = f"{place} {started}" + (f" {again}" if again else "")
        called = (name or place.name) + (f" (retry {again})" if again else "")
        return cls(folder, called, sha256(words.encode()).hexdigest()[:16], config, after_step, again)


class Tracker(Protocol):
    """Takes the records of a run. Both methods may raise any exception."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Store the numbers of one record. Steps never decrease, and several records may have the same step."""

    def close(self, status: Status) -> None:
        """Finish, because the run or this start of it has ended."""


def start_trackers(names: Sequence[str], run: Tracked, note: Note) -> list[Guarded | Behind]:
    """Start the trackers of ``train.report_to``; ``note`` is called for each that fails, now or later."""
    return [(Guarded if name in LOCAL else Behind)(name, _starter(name, run), note) for name in dict.fromkeys(names)]


def _starter(name: str, run: Tracked) -> Callable[[], Tracker]:
    def start() -> Tracker:
        tracker: Tracker = import_module(f"ptd.trackers.{name}").start(run)
        return tracker

    return start


class Guarded:
    """A tracker that is dropped with one note when it fails."""

    def __init__(self, name: str, start: Callable[[], Tracker], note: Note) -> None:
        self.name, self._note = name, note
        self._tracker: Tracker | None = None
        self._tracker = self._guard(start)

    @property
    def failed(self) -> bool:
        return self._tracker is None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._guard(lambda: tracker.log(step, values))

    def close(self, status: Status) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._guard(lambda: tracker.close(status))

    def _guard(self, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except (Exception, SystemExit) as error:
            self._tracker = None
            missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == self.name
            said = f"it is not installed: pip install 'ptd[{self.name}]'" if missing else _in_a_line(error)
            self._note(f"train.report_to: {self.name} gets no more records ({said}); the run continues without it")
            return None


class Behind:
    """A `Guarded` tracker in its own thread, so that a slow or unreachable server does not delay the run."""

    def __init__(self, name: str, start: Callable[[], Tracker], note: Note) -> None:
        self.name, self._note = name, note
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._calls: queue.SimpleQueue[Callable[[Guarded], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(start,), name=f"ptd-{name}", daemon=True)
        self._thread.start()

    def _work(self, start: Callable[[], Tracker]) -> None:
        tracker = Guarded(self.name, start, self._notes.put)
        while not tracker.failed and (call := self._calls.get()) is not None:
            call(tracker)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._speak()
        if self._thread.is_alive():
            self._calls.put(lambda tracker: tracker.log(step, values))

    def close(self, status: Status) -> None:
        self._calls.put(lambda tracker: tracker.close(status))
        self._calls.put(None)
        self._thread.join(PATIENCE[status])
        if self._thread.is_alive():
            self._note(f"train.report_to: {self.name} did not take all records within {PATIENCE[status]:.0f} s")
        self._speak()

    def _speak(self) -> None:
        """Pass on the notes; only the run's own thread calls this."""
        while not self._notes.empty():
            self._note(self._notes.get())


def _in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
