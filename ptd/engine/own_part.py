"""This rank's part of tensors that may be split over the ranks of a node (DTensor)."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


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
