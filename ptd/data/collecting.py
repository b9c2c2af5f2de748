"""Collect the examples that a task yields piece by piece: in memory, or in files (`ptd.data.cache`).

A task tokenises about a thousand rows at a time and yields them as small `Examples`. `collect` appends their arrays to
columns, so that tokenising holds one piece in memory and not all rows, if the columns are files.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np

from ptd.types import DataReport, Examples

Pieces = Iterator[Examples | DataReport]
"""The examples of consecutive rows, each with the report on its rows; a `DataReport` alone adds to the report."""
DTYPES: dict[str, type[np.generic]] = {
    "tokens": np.int32,
    "labels": np.int32,
    "offsets": np.int64,
    "token_types": np.int8,
    "supervised": np.int32,
}
"""Name -> dtype of a column; the columns of ``aside`` are int32."""

ROWS_PER_PIECE = 1000
"""Rows of the data that are tokenised at a time."""
T = TypeVar("T")


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of ``size``; the last list may be shorter. (Python 3.12 has it in itertools.)"""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


class TokenColumn(Protocol):
    """A one-dimensional array that grows."""

    def append(self, values: np.ndarray) -> None:
        """Append values of the column's dtype."""
        ...

    def array(self) -> np.ndarray:
        """Return the whole column, to which nothing is appended any more."""
        ...


class Columns(Protocol):
    """Where the columns of examples grow."""

    def __call__(self, name: str, dtype: type[np.generic]) -> TokenColumn:
        """Begin the column ``name``."""
        ...


class InMemory:
    """A column in memory; as an instance of `Columns`, it begins such columns."""

    def __init__(self, name: str, dtype: type[np.generic]) -> None:
        self._dtype, self._bytes = dtype, array("b")

    def append(self, values: np.ndarray) -> None:
        self._bytes.frombytes(values.astype(self._dtype, copy=False).tobytes())

    def array(self) -> np.ndarray:
        return np.frombuffer(self._bytes, dtype=self._dtype)


def collect(pieces: Iterable[Examples | DataReport], columns: Columns = InMemory) -> Examples:
    """Return the examples of all ``pieces``, in order; each column's name begins with its side (`Side`)."""
    report = DataReport(0, 0, 0)
    side = Side(columns)
    for piece in pieces:
        if isinstance(piece, DataReport):
            report += piece
        else:
            report += piece.report
            side.add(piece)
    return side.examples(report)


class Side:
    """The growing columns of one side: of the examples, or (``prefix`` "source.") of what an encoder reads."""

    def __init__(self, columns: Columns, prefix: str = "") -> None:
        self._begin, self._prefix = columns, prefix
        self._group: int | None = None
        self._length = 0
        self._tokens, self._labels, self._offsets = (self._column(name) for name in ("tokens", "labels", "offsets"))
        self._offsets.append(np.zeros(1, dtype=np.int64))
        self._types: TokenColumn | None = None
        self._aside: dict[str, TokenColumn] | None = None
        self._source: Side | None = None
        self._source_report = DataReport(0, 0, 0)

    def _column(self, name: str, dtype: type[np.generic] | None = None) -> TokenColumn:
        return self._begin(f"{self._prefix}{name}", dtype or DTYPES[name])

    def add(self, piece: Examples) -> None:
        """Append the rows of ``piece``. All pieces have the same ``group`` and the same arrays ``aside``."""
        if self._group is None:
            self._group = piece.group
            if piece.aside is not None:
                self._aside = {name: self._column(f"aside.{name}", np.int32) for name in piece.aside}
            if piece.source is not None:
                self._source = Side(self._begin, f"{self._prefix}source.")
        assert self._group == piece.group
        self._tokens.append(piece.tokens)
        self._labels.append(piece.labels)
        self._offsets.append(piece.offsets[1:] + self._length)
        self._add_types(piece)
        self._length += len(piece.tokens)
        if self._aside is not None:
            assert piece.aside is not None
            for name, column in self._aside.items():
                column.append(piece.aside[name])
        if self._source is not None:
            assert piece.source is not None
            self._source.add(piece.source)
            self._source_report += piece.source.report

    def _add_types(self, piece: Examples) -> None:
        """Append the token types. Only some pieces may have any; the types of the other pieces are zeros."""
        if self._types is None and piece.token_types is not None:
            self._types = self._column("token_types")
            for begin in range(0, self._length, 2**20):
                self._types.append(np.zeros(min(2**20, self._length - begin), dtype=np.int8))
        if self._types is not None:
            types = piece.token_types
            self._types.append(np.zeros(len(piece.tokens), dtype=np.int8) if types is None else types)

    def examples(self, report: DataReport) -> Examples:
        """Return what was added."""
        return Examples(
            self._tokens.array(),
            self._labels.array(),
            self._offsets.array(),
            report,
            self._group or 1,
            None if self._types is None else self._types.array(),
            None if self._source is None else self._source.examples(self._source_report),
            None if self._aside is None else {name: column.array() for name, column in self._aside.items()},
        )
