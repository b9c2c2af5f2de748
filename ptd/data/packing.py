"""Which rows share a slot: plain functions of token counts."""

from __future__ import annotations

import heapq

import numpy as np


def balance(lengths: np.ndarray, slots: int) -> tuple[list[list[int]], np.ndarray]:
    """Longest first to the least loaded slot (ties: the first). Gives each slot's indices and its load ``[slots]``."""
    members: list[list[int]] = [[] for _ in range(slots)]
    heap = [(0, slot) for slot in range(slots)]
    sizes = lengths.tolist()
    for index in np.argsort(-lengths, kind="stable").tolist():
        load, slot = heap[0]
        members[slot].append(index)
        heapq.heapreplace(heap, (load + sizes[index], slot))
    loads = np.zeros(slots, dtype=np.int64)
    for load, slot in heap:
        loads[slot] = load
    return members, loads


def first_fit(lengths: np.ndarray, slots: int, max_tokens: int) -> tuple[list[list[int]], np.ndarray]:
    """In order, each to the first slot with room. Stops at the first length that fits none.

    Gives each slot's indices and its load ``[slots]``.
    """
    members: list[list[int]] = [[] for _ in range(slots)]
    loads = np.zeros(slots, dtype=np.int64)
    for index, length in enumerate(lengths.tolist()):
        fits = loads <= max_tokens - length
        slot = int(fits.argmax())
        if not fits[slot]:
            break
        members[slot].append(index)
        loads[slot] += length
    return members, loads


def first_fit_starts(lengths: np.ndarray, slots: int, max_tokens: int) -> np.ndarray:
    """Where each step begins if it takes what `first_fit` takes: int64 ``[steps + 1]``."""
    starts = [0]
    loads = np.zeros(slots, dtype=np.int64)
    for index, length in enumerate(lengths.tolist()):
        fits = loads <= max_tokens - length
        slot = int(fits.argmax())
        if not fits[slot]:
            starts.append(index)
            loads[:] = 0
            slot = 0
        loads[slot] += length
    return np.array([*starts, len(lengths)], dtype=np.int64)
