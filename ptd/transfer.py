"""Between the host and a GPU, in both directions, without either waiting for the other.

A GPU does what it is given in order, long after the host has asked for it. Reading a number of it, or copying to it
from memory that may be paged out, makes the host wait until everything before it is done, and leaves the GPU without
work while the host asks for the next thing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; to a GPU it goes from pinned memory, beside whatever runs there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # the tensor itself where it is pinned already; kept until the copy is done
    return tensor.to(device, non_blocking=True)


def together(numbers: Sequence[Tensor | float], device: torch.device) -> Tensor:
    """Numbers that the host knows and numbers that ``device`` has as one tensor there, float64 ``[len(numbers)]``."""
    known = [0.0 if isinstance(number, Tensor) else number for number in numbers]
    found = to_device(torch.tensor(known, dtype=torch.float64), device)
    for place, number in enumerate(numbers):
        if isinstance(number, Tensor):
            found[place] = number.detach()
    return found


class OnItsWay:
    """Numbers that a device will have computed, of any shape and dtype, on their way to the host."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.detach().to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self._arrived = torch.cuda.Event() if numbers.device.type == "cuda" else None
        if self._arrived is not None:
            self._arrived.record()

    def tensor(self) -> Tensor:
        """The numbers on the host; waits until they are there, for nothing that was asked for later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers

    def read(self) -> list[float]:
        """The same, flattened."""
        return [float(number) for number in self.tensor().flatten().tolist()]
