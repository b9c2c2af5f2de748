"""Ranks wait for long work of rank 0 as long as it lives, and no longer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from ptd.distributed.long_work import LongWork
from ptd.errors import RankError, UserError


def refuse() -> None:
    time.sleep(0.3)
    raise UserError("row 3 is empty")


@pytest.mark.parametrize("work", [lambda: time.sleep(1.0), refuse])
def test_work_may_take_longer_than_the_patience(work: Callable[[], None]) -> None:
    store, order = dist.HashStore(), list[str]()

    def rank_0() -> None:
        try:
            LongWork(store, 3, patience=0.2).run(work)
        except UserError:
            order.append("refused")
        order.append("ended")

    thread = threading.Thread(target=rank_0)
    began = time.monotonic()
    thread.start()
    LongWork(store, 3, patience=0.2).wait()
    waited = time.monotonic() - began
    thread.join()
    assert waited > 0.25
    assert order == (["refused", "ended"] if work is refuse else ["ended"])
    LongWork(store, 3, patience=0.2).wait()  # returns at once


def test_a_rank_0_without_a_sign_of_life_is_given_up() -> None:
    store = dist.HashStore()
    LongWork(store, 0, patience=0.2).run(lambda: None)
    with pytest.raises(RankError, match="no sign of life for"):
        LongWork(store, 1, patience=0.2).wait()
