"""Prepare micro-batches in advance on a thread, in pinned memory if there is a GPU to copy them to."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator

import torch

from ptd.data.batches import Batches
from ptd.types import Batch

_Item = tuple[int, list[Batch]] | BaseException


def prefetch(
    batches: Batches, start_step: int, stop_step: int, depth: int = 2
) -> Generator[tuple[int, list[Batch]], None, None]:
    """Yield ``(global_step, micro-batches)`` for the steps in order, with up to ``depth`` steps prepared in advance.

    An exception in the thread is raised here, at the step in which it occurred. The thread ends when no step is left or
    the iterator is closed (after a ``break`` from a ``for`` loop: at the latest when it is garbage-collected).
    """
    assert depth >= 1
    # A thread starts on GPU 0: without set_device, pinning would create a CUDA context there for every rank.
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
        except BaseException as error:  # raised in the consumer, which would otherwise wait forever
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
        # The thread may still put one item after the flag is set; the emptied queue has room for it.
        with contextlib.suppress(queue.Empty):
            while True:
                items.get_nowait()
        thread.join()


def _pin(batch: Batch) -> Batch:
    return batch.map(lambda tensor: tensor.pin_memory())
