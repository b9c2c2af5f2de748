"""Micro-batches made ahead of time on a thread, in pinned memory where there is a GPU to copy them to."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator

import torch

from ptd.data.batches import Batches
from ptd.types import Batch

_Item = tuple[int, list[Batch]] | BaseException


def prefetch(batches: Batches, start_step: int, stop_step: int, depth: int = 2) -> Iterator[tuple[int, list[Batch]]]:
    """Yield ``(global_step, micro-batches)`` for the steps in order, up to ``depth`` of them prepared in advance.

    An exception of the thread is raised here, at the step it belongs to. The thread ends when the steps are exhausted
    or the iterator is closed (as a ``for`` loop that is left does at the latest when the iterator is collected).
    """
    assert depth >= 1
    # A thread starts on GPU 0: without naming the rank's own, pinning would open a context there for every rank.
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    items: queue.Queue[_Item] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def work() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            for step in range(start_step, stop_step):
                made = batches.step(step)
                items.put((step, made if device is None else [_pin(batch) for batch in made]))
                if closed.is_set():
                    return
        except BaseException as error:  # the consumer decides; a silent end of the thread would hang it
            items.put(error)

    thread = threading.Thread(target=work, name="ptd-prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(start_step, stop_step):
            item = items.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        # Emptied after the flag is set, the queue has room for the one item that the thread may still put.
        with contextlib.suppress(queue.Empty):
            while True:
                items.get_nowait()
        thread.join()


def _pin(batch: Batch) -> Batch:
    return batch.map(lambda tensor: tensor.pin_memory())
