"""What a step's time is spent on: one clock for the records of a run and for a benchmark."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from typing import Protocol

import torch

PHASES = ("data", "encoder", "forward", "backward", "reduce", "optimizer")
"""What a step's time is spent on; ``optimizer`` with clipping, ``encoder`` forward and backward."""
OWN = ("data", "forward", "backward")
"""Of them, in which a rank waits for no other (but for the weights of a sharded backbone)."""
OTHER = "other"
"""The rest of a step."""
PENDING = 64
"""Marks from which on those that the device has passed are read, so that they do not pile up."""


class _Moment(Protocol):
    """A moment of the process or of the device."""

    def mark(self) -> None:
        """It is now: when the device comes to what it is given next."""

    def passed(self) -> bool:
        """Whether it can be read."""

    def wait(self) -> None:
        """Until it can be read."""

    def until(self, later: _Moment) -> float:
        """Seconds from it to another, when both have passed."""


class PhaseClock:
    """Seconds of each phase: `begin` names the phase that begins now and ends the one before it, `pause` only ends it.

    On a CPU a phase is time of the process. On a GPU it is time of the device, between CUDA events on the stream that
    is current: `begin` and `pause` put one there and wait for nothing; events are read (and used again) where the
    device has passed them already, and `take` alone waits. A phase then lasts until the device has done what it was
    given in it, whenever the process gave it that; where the process was late, the device's waiting is in the phase.
    (On a GPU this has not been run yet.)
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
        """Seconds of each phase since the last `take`, up to the last `begin` or `pause`. Waits for the device."""
        self._read(wait=True)
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken

    def start(self, name: str) -> None:
        """Wait until the device has done all it was given; then begin anew with this phase."""
        self._marks.clear()
        self._seconds.clear()
        self._finish()
        self._began = time.perf_counter()
        self.begin(name)

    def stop(self) -> tuple[float, dict[str, float]]:
        """Seconds of the process from `start` until the device has done everything, and those of each phase."""
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
