"""Copy tensors between the host and a GPU, in both directions, without making either wait for the other.

A GPU runs its work in order, long after the host has queued it. If the host reads a number from the GPU, or copies from
pageable memory to it, the host waits until all earlier work is done. The GPU then has no work until the host queues the
next operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on ``device``. A copy to a GPU is asynchronous, from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # no copy if it is pinned already; the memory stays allocated during the transfer
    return tensor.to(device, non_blocking=True)


def together(numbers: Sequence[Tensor | float], device: torch.device) -> Tensor:
    """Return host numbers and scalars of ``device`` as one tensor on ``device``, float64 ``[len(numbers)]``."""
    known = [0.0 if isinstance(number, Tensor) else number for number in numbers]
    found = to_device(torch.tensor(known, dtype=torch.float64), device)
    for place, number in enumerate(numbers):
        if isinstance(number, Tensor):
            found[place] = number.detach()
    return found


class AsyncHostCopy:
    """An asynchronous copy to the host of a device tensor of any shape and dtype, which may not be computed yet."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.detach().to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self._arrived = torch.cuda.Event() if numbers.device.type == "cuda" else None
        if self._arrived is not None:
            self._arrived.record()

    def tensor(self) -> Tensor:
        """Return the tensor on the host. Waits for the copy, but not for work that was queued after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers

    def read(self) -> list[float]:
        """Return the numbers of `tensor`, flattened."""
        return [float(number) for number in self.tensor().flatten().tolist()]
