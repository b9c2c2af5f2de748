"""Linear layers with the same input, such as those of queries, keys and values: one gradient of that input.

The gradient of the input is the sum of one product per layer. Autograd writes each product and adds them in kernels of
their own; here each product is added to the sum where it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from ptd.types import is_partitioned

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of linear layers that their parent calls with the same tensor, in this order."""


def share_inputs(model: nn.Module) -> int:
    """Compute the layers of each group in `TOGETHER` together, in place; return the number of groups.

    Only plain linear layers with frozen weights on this rank are grouped: neither quantised nor sharded ones.
    """
    groups = list(_groups(model))
    for layers in groups:
        shared = SharedInput(layers)
        for index, layer in enumerate(layers):
            layer.forward = partial(shared, index)  # type: ignore[method-assign]
    return len(groups)


def _groups(model: nn.Module) -> Iterator[list[nn.Linear]]:
    for module in model.modules():
        children = dict(module.named_children())
        for names in TOGETHER:
            layers = [child for name in names if type(child := children.get(name)) is nn.Linear]
            weights = [weight for layer in layers for weight in layer.parameters()]
            if len(layers) == len(names) and not any(each.requires_grad or is_partitioned(each) for each in weights):
                yield layers


class SharedInput:
    """The forward method of the linear ``layers``: the first one's call computes all of them.

    A call with another tensor than the first one's computes its layer alone.
    """

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.layers = layers
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Return the output of layer ``index``: [..., in] -> [..., out]."""
        if index == 0:
            weights, biases = [layer.weight for layer in self.layers], [layer.bias for layer in self.layers]
            self._input, self._outputs = x, dict(enumerate(_Products.apply(x, len(weights), *weights, *biases)))
        elif x is not self._input:
            self._outputs.clear()
        found = self._outputs.pop(index, None)
        if not self._outputs:
            self._input = None
        layer = self.layers[index]
        return nn.functional.linear(x, layer.weight, layer.bias) if found is None else found


class _Products(Function):
    """x, weights, biases -> the outputs of all layers. Only ``x`` has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = tensors[:count], tensors[count:]
        ctx.save_for_backward(*weights)
        ctx.rest = 1 + len(tensors)
        ctx.set_materialize_grads(False)
        pairs = zip(weights, biases, strict=True)
        return tuple(nn.functional.linear(x, weight, bias) for weight, bias in pairs if weight is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        total: Tensor | None = None
        shape: torch.Size | None = None
        for gradient, weight in zip(gradients, ctx.saved_tensors, strict=True):
            if gradient is None:
                continue
            rows, shape = gradient.flatten(0, -2), gradient.shape[:-1]
            total = rows @ weight if total is None else total.addmm_(rows, weight)
        found = None if total is None or shape is None else total.view(*shape, -1)
        return found, *(None,) * ctx.rest
