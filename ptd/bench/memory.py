"""Measure the peak memory of a step."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import torch


class PeakMemory:
    """Peak memory of a step above what the process used when this object was created: before the backbone was loaded.

    On a GPU, memory of torch's allocator. On a CPU, resident memory (VmHWM), which is reset before each step; if the
    system does not allow the reset, the peak is the peak of all steps so far.
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
        """Return the peak in bytes."""
        now = torch.cuda.max_memory_allocated(self._device) if self._on_gpu else _resident("VmHWM")
        return now - self._baseline


def _resident(name: str) -> int:
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="ignore")
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
