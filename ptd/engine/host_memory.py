"""Keep freed host memory in the process, so that the next step can reuse it."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
MAPPED_FROM = 1 << 28
"""Bytes from which glibc still maps an allocation separately."""
OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory in its heap; return whether it does.

    By default glibc maps each large block again (from 32 MiB at the latest) and returns the free end of the heap to the
    system. The kernel then fills the pages of the activations with zeros in every training step on the host. The memory
    kept never exceeds the peak in use. Nothing changes without glibc, or if the environment sets one of `OWN_SETTINGS`.
    """
    if any(name in os.environ for name in OWN_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another libc, or another system
        return False
    mapped, trimmed = mallopt(_MMAP_THRESHOLD, MAPPED_FROM), mallopt(_TRIM_THRESHOLD, -1)
    return bool(mapped and trimmed)
