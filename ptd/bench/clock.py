"""Where the time and the memory of a step go."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import torch


class PhaseClock:
    """Splits a step into phases: calling it with a name says that this phase begins now.

    On a GPU the phases are those of the device (CUDA events, read after the step), on a CPU of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []
        self._began = 0.0

    def start(self, name: str) -> None:
        """A step begins with this phase."""
        self._marks.clear()
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        self._began = time.perf_counter()
        self(name)

    def __call__(self, name: str) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def stop(self) -> tuple[float, dict[str, float]]:
        """Seconds from `start` until all work is done, and those of each phase; the phases come after each other."""
        self("")
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._began
        phases: defaultdict[str, float] = defaultdict(float)
        for (name, begun), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(begun, float) and isinstance(ended, float):
                phases[name] += ended - begun
            elif not isinstance(begun, float) and not isinstance(ended, float):
                phases[name] += begun.elapsed_time(ended) / 1000
        return seconds, dict(phases)


class PeakMemory:
    """Peak memory of a step above what the process had when this was made: before the backbone was loaded.

    On a GPU torch's allocator. On a CPU resident memory (VmHWM), reset before each step; where the system does not
    allow that, the peak is that of all steps so far.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._baseline = torch.cuda.memory_allocated(device) if self._on_gpu else _resident("VmRSS")

    def reset(self) -> None:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> int:
        """Bytes."""
        now = torch.cuda.max_memory_allocated(self._device) if self._on_gpu else _resident("VmHWM")
        return now - self._baseline


def _resident(name: str) -> int:
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="ignore")
    except OSError:  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
