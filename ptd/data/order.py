"""Order the rows of an epoch, with a part of the order in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

WINDOW = 2**19
"""Rows, at most about, whose order is in memory at a time."""
DRAWS = 2**16
"""Random draws that are made at a time."""
KEPT = 2
"""Windows that are kept: a step may begin in one and end in the next."""


class Order(Protocol):
    """A permutation of the numbers from 0 to ``rows - 1``."""

    rows: int

    def between(self, first: int, stop: int) -> np.ndarray:
        """Return the permutation's values from place ``first`` to before ``stop``; int64."""
        ...


class InOrder:
    """The rows as they are."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def between(self, first: int, stop: int) -> np.ndarray:
        return np.arange(first, stop)


class LongestFirst:
    """The rows by their length, the longest first; rows of one length as they are."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.rows = len(lengths)
        self._order = np.argsort(-lengths.astype(np.int64), kind="stable").astype(np.uint32)

    def between(self, first: int, stop: int) -> np.ndarray:
        return self._order[first:stop].astype(np.int64)


class Shuffled:
    """The rows sorted by one 64-bit draw each (draws that are equal: in order), without all draws in memory.

    The range of the draws is divided into equal parts. Rows whose draws fall into one part are consecutive in the
    order: a *window*. A window is computed by making all draws again and sorting those in its part.

    The draws are raw, because NumPy guarantees only raw draws across versions (not ``Generator.permutation``).
    """

    def __init__(self, rows: int, seed: int, epoch: int) -> None:
        self.rows, self._seeds = rows, (seed, epoch)
        self._bits = (max(rows - 1, 0) // WINDOW).bit_length()
        """The first bits of a draw, which are the number of its window."""
        sizes = np.zeros(1 << self._bits, dtype=np.int64)
        for _, draws in self._draws():
            sizes += np.bincount(self._windows(draws), minlength=len(sizes))
        self._starts = np.concatenate(([0], np.cumsum(sizes)))
        self._kept: dict[int, np.ndarray] = {}

    def between(self, first: int, stop: int) -> np.ndarray:
        parts = [np.empty(0, dtype=np.int64)]
        while first < stop:
            window = int(np.searchsorted(self._starts, first, side="right")) - 1
            begin, end = self._starts[window : window + 2]
            parts.append(self._window(window)[first - begin : min(stop, end) - begin])
            first = min(stop, end)
        return np.concatenate(parts)

    def _window(self, window: int) -> np.ndarray:
        if window not in self._kept:
            chosen = [
                (draws[inside], first + np.flatnonzero(inside))
                for first, draws in self._draws()
                for inside in [self._windows(draws) == window]
            ]
            draws, rows = (np.concatenate(each) for each in zip(*chosen, strict=True))
            self._kept = {key: self._kept[key] for key in list(self._kept)[1 - KEPT :]}
            self._kept[window] = rows[np.argsort(draws, kind="stable")]
        return self._kept[window]

    def _windows(self, draws: np.ndarray) -> np.ndarray:
        """Return the number of the window of each draw."""
        # Two shifts: a shift of all 64 bits would have no effect.
        return ((draws >> np.uint64(1)) >> np.uint64(63 - self._bits)).astype(np.intp)

    def _draws(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the draws of consecutive rows, uint64, after the number of the first row."""
        source = np.random.PCG64(np.random.SeedSequence(self._seeds))
        for first in range(0, self.rows, DRAWS):
            yield first, source.random_raw(min(DRAWS, self.rows - first))
