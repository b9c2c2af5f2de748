"""Assign rows to slots (micro-batches), by their token counts alone."""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_left
from collections.abc import Iterable

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


class _FirstFit:
    """Slots of ``max_tokens`` tokens each; a length goes to the first slot with room.

    A slot can be the first with room only if no slot before it has as much room. `_slots` are these slots and `_room`
    is their room, which increases, so the slot is found by bisection.
    """

    def __init__(self, slots: int, max_tokens: int) -> None:
        self._all = [max_tokens] * slots
        self._slots, self._room, self._max_tokens = [0], [max_tokens], max_tokens

    def place(self, length: int) -> int | None:
        """Put a length, at least 1, into a slot and return the slot; None if no slot has room."""
        place = bisect_left(self._room, length)
        if place == len(self._room):
            return None
        slot = self._slots[place]
        left = self._all[slot] = self._room[place] - length
        most = self._room[place - 1] if place else 0
        if left > most:
            self._room[place] = most = left
            place += 1
        else:
            del self._slots[place], self._room[place]
        # Slots behind this one, before the next in `_slots`, had too little room to count until now.
        behind = self._slots[place] if place < len(self._slots) else len(self._all)
        for other in range(slot + 1, behind):
            if self._all[other] > most:
                most = self._all[other]
                self._slots.insert(place, other)
                self._room.insert(place, most)
                place += 1
                if most == self._max_tokens:
                    break
        return slot


def first_fit(lengths: np.ndarray, slots: int, max_tokens: int) -> tuple[list[list[int]], np.ndarray]:
    """Assign lengths to slots in order, each to the first slot with room; stop at the first length that fits no slot.

    Return each slot's indices and its load in tokens, int64 ``[slots]``.
    """
    members: list[list[int]] = [[] for _ in range(slots)]
    loads = np.zeros(slots, dtype=np.int64)
    fit = _FirstFit(slots, max_tokens)
    for index, length in enumerate(lengths.tolist()):
        slot = fit.place(length)
        if slot is None:
            break
        members[slot].append(index)
        loads[slot] += length
    return members, loads


def first_fit_starts(lengths: Iterable[np.ndarray], slots: int, max_tokens: int) -> np.ndarray:
    """Return where each step begins if steps are filled by `first_fit`: int64 ``[steps]``.

    ``lengths``: all lengths, at most ``max_tokens`` each, in blocks, because an epoch may have millions of rows.
    """
    starts, fit = array("q", [0]), _FirstFit(slots, max_tokens)
    for index, length in enumerate(length for block in lengths for length in block.tolist()):
        if fit.place(length) is None:
            starts.append(index)
            fit = _FirstFit(slots, max_tokens)
            fit.place(length)
    return np.frombuffer(starts, dtype=np.int64)
