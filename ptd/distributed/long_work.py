"""Wait for work of rank 0 that may take longer than a collective waits, for as long as rank 0 is alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from torch.distributed.distributed_c10d import Store

from ptd.errors import RankError

T = TypeVar("T")
BEAT = 10.0
"""Seconds between two signs of life of rank 0."""
LONGEST_SLEEP = 1.0
"""Seconds, at most, between two looks of a waiting rank."""


class LongWork:
    """A piece of work with a number that every rank knows. Rank 0 calls `run`, the others call `wait`.

    ``patience``: seconds without a sign of life after which rank 0 counts as lost.
    """

    def __init__(self, store: Store, number: int, patience: float) -> None:
        self._store, self._patience = store, patience
        self._beats, self._done = f"long/{number}/beats", f"long/{number}/done"

    def run(self, work: Callable[[], T]) -> T:
        """Return the result of ``work``; give signs of life until it ends, also by an exception."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(min(BEAT, self._patience / 4)):
                self._store.add(self._beats, 1)

        thread = threading.Thread(target=beat, name="ptd-signs-of-life", daemon=True)
        thread.start()
        try:
            return work()
        finally:
            over.set()
            thread.join()
            self._store.set(self._done, "")

    def wait(self) -> None:
        """Return when rank 0 has ended the work; raise `RankError` if it gives no sign of life."""
        began = heard = time.monotonic()
        beats = 0
        while not self._store.check([self._done]):
            now, found = time.monotonic(), self._store.add(self._beats, 0)
            if found != beats:
                beats, heard = found, now
            elif now - heard > self._patience:
                raise RankError(
                    f"rank 0 was to read the rows or to do other work for all ranks, and has given no sign of life for "
                    f"{now - heard:.0f} s; look for its error in its own output"
                )
            time.sleep(min(LONGEST_SLEEP, 0.001 + (now - began) / 10))
