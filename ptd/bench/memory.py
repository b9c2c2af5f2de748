"""The peak memory of a step."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import torch


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
