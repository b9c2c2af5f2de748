"""Assign rows to slots (micro-batches), by their token counts alone."""

from __future__ import annotations

import heapq

import numpy as np


def balance(lengths: np.ndarray, slots: int) -> tuple[list[list[int]], np.ndarray]:
    """Assign lengths to slots, longest first, each to the slot with the lowest load (ties: the first slot).

    Return each slot's indices and its load in tokens, int64 ``[slots]``.
    """
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
    """Assign lengths to slots in order, each to the first slot with room; stop at the first length that fits no slot.

    Return each slot's indices and its load in tokens, int64 ``[slots]``.
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
    """Return where each step begins if steps are filled by `first_fit`: int64 ``[steps + 1]``, the last the end."""
    starts = [0]
    loads = np.zeros(slots, dtype=np.int64)
    for index, length in enumerate(map(int, lengths)):  # no list: an epoch may have millions of rows
        fits = loads <= max_tokens - length
        slot = int(fits.argmax())
        if not fits[slot]:
            starts.append(index)
            loads[:] = 0
            slot = 0
        loads[slot] += length
    return np.array([*starts, len(lengths)], dtype=np.int64)
