"""The order of an epoch and its division into steps: the same as if all of it were in memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptd.data import order
from ptd.data.order import InOrder, Shuffled
from ptd.data.packing import first_fit, first_fit_starts


def sorted_draws(rows: int, seed: int, epoch: int) -> np.ndarray:
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(rows)
    return np.argsort(draws, kind="stable")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 9), st.integers(0, 9), st.data())
def test_windows_have_the_order_of_all_draws(rows: int, seed: int, epoch: int, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "WINDOW", 32)
        patch.setattr(order, "DRAWS", 50)
        found = Shuffled(rows, seed, epoch)
        wanted = sorted_draws(rows, seed, epoch)
        for _ in range(5):
            first = data.draw(st.integers(0, rows))
            stop = data.draw(st.integers(first, rows))
            assert found.between(first, stop).tolist() == wanted[first:stop].tolist()
        assert found.between(0, rows).tolist() == wanted.tolist()
        assert InOrder(rows).between(0, rows).tolist() == list(range(rows))


def test_a_large_order_has_windows_of_a_bounded_size() -> None:
    found = Shuffled(3 * order.WINDOW, 1, 0)
    wanted = sorted_draws(3 * order.WINDOW, 1, 0)
    for first in (2 * order.WINDOW, 0, order.WINDOW):
        assert found.between(first, first + 100).tolist() == wanted[first : first + 100].tolist()
    kept = found._kept.values()
    assert len(kept) == order.KEPT
    assert max(map(len, kept)) <= order.WINDOW


def plain_first_fit(lengths: list[int], slots: int, most: int) -> list[list[int]]:
    """Return the slot of each length of the first step, by looking at all slots."""
    members: list[list[int]] = [[] for _ in range(slots)]
    loads = [0] * slots
    for index, length in enumerate(lengths):
        slot = next((slot for slot in range(slots) if loads[slot] + length <= most), None)
        if slot is None:
            break
        members[slot].append(index)
        loads[slot] += length
    return members


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=120), st.integers(1, 9), st.integers(20, 60), st.integers(1, 50)
)
def test_first_fit(lengths: list[int], slots: int, most: int, block: int) -> None:
    members, loads = first_fit(np.array(lengths), slots, most)
    assert members == plain_first_fit(lengths, slots, most)
    assert loads.tolist() == [sum(lengths[index] for index in slot) for slot in members]
    starts, first = [], 0
    while first < len(lengths):
        starts.append(first)
        first += sum(map(len, plain_first_fit(lengths[first:], slots, most)))
    blocks = (np.array(lengths[begin : begin + block]) for begin in range(0, len(lengths), block))
    assert first_fit_starts(blocks, slots, most).tolist() == starts
