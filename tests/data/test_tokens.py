"""Rows that are in two files are counted by hashes, which must not count a row twice or by mistake."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptd.data import tokens
from ptd.data.tokens import rows_in_both
from ptd.types import DataReport, Examples

rows_of_tokens = st.lists(st.lists(st.integers(-1, 2), min_size=1, max_size=3), min_size=1, max_size=30)


def examples_of(rows: list[list[int]], source: Examples | None = None) -> Examples:
    flat = np.array([token for row in rows for token in row], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Examples(flat, flat, offsets, DataReport(len(rows), len(flat), 0), source=source)


def counted(train: list[list[int]], held_out: list[list[int]]) -> int:
    known = {tuple(row) for row in train}
    return sum(number for row, number in Counter(map(tuple, held_out)).items() if row in known)


@settings(max_examples=200, deadline=None)
@given(rows_of_tokens, rows_of_tokens, st.booleans())
def test_rows_in_both(train: list[list[int]], held_out: list[list[int]], alike: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if alike:  # all hashes are equal, so only the comparison of tokens decides
            patch.setattr(tokens, "_hashes", equal_hashes)
        assert rows_in_both(examples_of(train), examples_of(held_out)) == counted(train, held_out)


def equal_hashes(examples: Examples, factors: np.ndarray) -> list[tuple[int, np.ndarray]]:
    return [(0, np.zeros(len(examples), dtype=np.uint64))]


def test_an_encoder_decoder_reads_its_source() -> None:
    one = examples_of([[1], [2]], source=examples_of([[5, 6], [7]]))
    other = examples_of([[3], [4], [2]], source=examples_of([[7], [5], [5, 6]]))
    assert rows_in_both(one, other) == 2


def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptd.types.BLOCK", 7)
    draws = np.random.default_rng(0)
    train, held_out = ([draws.integers(0, 4, draws.integers(1, 5)).tolist() for _ in range(400)] for _ in range(2))
    assert 0 < rows_in_both(examples_of(train), examples_of(held_out)) == counted(train, held_out) < 400
