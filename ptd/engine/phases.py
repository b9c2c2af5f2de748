"""Measure the time of each phase of a step, for the records of a run and for benchmarks."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from typing import Protocol

import torch

PHASES = ("data", "encoder", "forward", "backward", "reduce", "optimizer")
"""The phases of a step; ``optimizer`` includes clipping, ``encoder`` is its forward and backward pass."""
OWN = ("data", "forward", "backward")
"""The phases in which a rank does not wait for others (except for the weights of a sharded backbone)."""
OTHER = "other"
"""The rest of a step."""
PENDING = 64
"""With more marks than this, the clock reads those that the device has passed, so that marks do not accumulate."""


class _Moment(Protocol):
    """A point in time of the process or of the device."""

    def mark(self) -> None:
        """Set the moment to now; on a device, to when it reaches the work that is queued next."""

    def passed(self) -> bool:
        """Return whether the moment can be read."""

    def wait(self) -> None:
        """Wait until the moment can be read."""

    def until(self, later: _Moment) -> float:
        """Return the seconds from this moment to a later one; both must have passed."""


class PhaseClock:
    """A clock that sums the seconds of each phase.

    `begin` ends the current phase and starts the one it names; `pause` only ends the current phase. On a CPU the clock
    measures time of the process. On a GPU it measures time of the device, between CUDA events on the current stream:
    `begin` and `pause` record an event without waiting, the clock reads (and reuses) events that the device has
    passed, and only `take`, `start` and `stop` wait. A phase ends when the device has finished the work queued in it,
    no matter when the process queued it; if the process was late, the phase includes the idle time of the device. (On a
    GPU this has not been run yet.)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: deque[tuple[str | None, _Moment]] = deque()
        self._free: list[_Moment] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._began = 0.0

    def begin(self, name: str) -> None:
        self._mark(name)

    def pause(self) -> None:
        self._mark(None)

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase from the last `take` to the last `begin` or `pause`; wait for the device."""
        self._read(wait=True)
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken

    def start(self, name: str) -> None:
        """Wait until the device has finished all queued work, then reset the clock and begin this phase."""
        self._marks.clear()
        self._seconds.clear()
        self._finish()
        self._began = time.perf_counter()
        self.begin(name)

    def stop(self) -> tuple[float, dict[str, float]]:
        """Wait for the device; return the process's seconds since `start` and the seconds of each phase."""
        self.pause()
        self._finish()
        return time.perf_counter() - self._began, self.take()

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _mark(self, name: str | None) -> None:
        moment = self._free.pop() if self._free else self._moment()
        moment.mark()
        self._marks.append((name, moment))
        if len(self._marks) > PENDING:
            self._read(wait=False)

    def _moment(self) -> _Moment:
        return _OfDevice(self._device) if self._device.type == "cuda" else _OfProcess()

    def _read(self, *, wait: bool) -> None:
        while len(self._marks) > 1:
            ended = self._marks[1][1]
            if wait:
                ended.wait()
            elif not ended.passed():
                return
            name, begun = self._marks.popleft()
            if name is not None:
                self._seconds[name] += begun.until(ended)
            self._free.append(begun)


class _OfProcess:
    at = 0.0

    def mark(self) -> None:
        self.at = time.perf_counter()

    def passed(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def until(self, later: _Moment) -> float:
        assert isinstance(later, _OfProcess)
        return later.at - self.at


class _OfDevice:
    def __init__(self, device: torch.device) -> None:
        self._device, self._event = device, torch.cuda.Event(enable_timing=True)

    def mark(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def passed(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()

    def until(self, later: _Moment) -> float:
        assert isinstance(later, _OfDevice)
        return float(self._event.elapsed_time(later._event)) / 1000
