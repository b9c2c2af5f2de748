"""Memory of the host that is freed stays with the process, for the next step to take."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
MAPPED_FROM = 1 << 28
"""Bytes from which an allocation is still mapped by itself."""
OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed in its heap; whether it does now.

    By default it maps each large block anew (from 32 MiB at the latest) and gives back the heap's free end, and every
    training step that computes on the host has the pages of its activations filled with zeros once more. What is kept
    is never more than what was in use at the peak. Nothing changes without glibc, or where the environment has
    `OWN_SETTINGS`.
    """
    if any(name in os.environ for name in OWN_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another libc, or another system
        return False
    mapped, trimmed = mallopt(_MMAP_THRESHOLD, MAPPED_FROM), mallopt(_TRIM_THRESHOLD, -1)
    return bool(mapped and trimmed)
