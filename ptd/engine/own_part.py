"""This rank's part of tensors that may be split over the ranks of a node (DTensor), in slices of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.distributed.tensor import DTensor

SLICE = 1 << 22
"""Numbers that an optimizer updates at a time, so that its temporary tensors do not grow with the parameter.

bitsandbytes' CPU kernels allocate 20 bytes per number, and its CUDA kernels count numbers in 32 bits.
"""


def own_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, detached; it shares its memory with the tensor."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def own_gradient(parameter: Tensor) -> Tensor:
    """Return the gradient of this rank's part of a parameter that has a gradient."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return own_part(gradient)


def slices(tensor: Tensor) -> Iterator[slice]:
    """Yield slices of `SLICE` numbers that cover a flat tensor."""
    for start in range(0, tensor.numel(), SLICE):
        yield slice(start, min(start + SLICE, tensor.numel()))
