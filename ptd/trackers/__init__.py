"""Where the records of a run go beside its own folder: TensorBoard, Weights & Biases, MLflow. One file is one tracker.

A tracker is a guest: whatever becomes of it, the run goes on, and says once that the tracker does not.
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
"""Trackers that only write files; the others may have to wait for a server, and do that beside the training."""
PATIENCE: dict[Status, float] = {"finished": 60.0, "preempted": 5.0, "failed": 5.0}
"""Seconds in which a tracker has to hand over what it still has, by how the run ended."""


@dataclass(frozen=True)
class Tracked:
    """A run as its trackers know it. Each start that continues it after ``after_step`` has the same ``id``.

    What follows a divergence, with another learning rate, is another run to them: ``again`` is the number of it.
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
        """``started``: when the first start of the run began."""
        place = folder.resolve()
        words = f"{place} {started}" + (f" {again}" if again else "")
        called = (name or place.name) + (f" (retry {again})" if again else "")
        return cls(folder, called, sha256(words.encode()).hexdigest()[:16], config, after_step, again)


class Tracker(Protocol):
    """Takes the records of a run. Both may raise whatever they like."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the numbers of one record; steps never fall, and several records may have one step."""

    def close(self, status: Status) -> None:
        """The run has ended, or this start of it."""


def start_trackers(names: Sequence[str], run: Tracked, note: Note) -> list[Guarded | Behind]:
    """Start the trackers of ``train.report_to``; ``note`` is told of those that fail, now or later."""
    return [(Guarded if name in LOCAL else Behind)(name, _starter(name, run), note) for name in dict.fromkeys(names)]


def _starter(name: str, run: Tracked) -> Callable[[], Tracker]:
    def start() -> Tracker:
        tracker: Tracker = import_module(f"ptd.trackers.{name}").start(run)
        return tracker

    return start


class Guarded:
    """A tracker that is dropped, and named in one note, when it fails."""

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
            self._note(f"train.report_to: {self.name} gets no more records ({said}); the run goes on without it")
            return None


class Behind:
    """A `Guarded` tracker in a thread of its own, so that a server that is slow or gone holds nobody up."""

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
        """Notes come from the run's own thread only."""
        while not self._notes.empty():
            self._note(self._notes.get())


def _in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found
