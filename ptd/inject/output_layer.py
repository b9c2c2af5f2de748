"""The output layer of a language model: it computes logits, or the cross-entropy of given tokens without logits."""

from __future__ import annotations

from typing import Any

from ptd_kernels import linear_cross_entropy
from ptd_kernels.linear_cross_entropy import DTYPES
from torch import Tensor, nn


class OutputLayer:
    """Hooks on the layer whose output is, unchanged, the model's logits; ``module`` None: the model has no such layer.

    With ``targets`` set, the next forward pass computes their cross-entropy from the layer's input, `take` returns the
    cross-entropy, and the model returns no logits. DeepSpeed's hooks run between the two hooks here. They see an input
    without rows or gradient, so the backward pass does not gather the weight again. After they have run, the weight is
    gathered.
    """

    def __init__(self, module: nn.Linear | None) -> None:
        self.module = module
        self.targets: Tensor | None = None
        self._hidden: Tensor | None = None
        self._loss: Tensor | None = None
        self._hooks: list[Any] = []

    @property
    def fuses(self) -> bool:
        """Whether the layer can compute a cross-entropy: its weight is frozen and of a dtype that needs no scale."""
        return self.module is not None and self.module.weight.dtype in DTYPES and not self.module.weight.requires_grad

    def hook(self) -> None:
        if self.module is not None:
            self._hooks = [
                self.module.register_forward_pre_hook(self._divert, prepend=True),
                self.module.register_forward_pre_hook(self._compute),
            ]

    def unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> Tensor:
        """Return the loss of the last pass, once."""
        loss, self._loss = self._loss, None
        assert loss is not None, "the last pass did not run the output layer with targets"
        return loss

    def _divert(self, module: nn.Linear, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.targets is None:
            return None
        self._hidden = args[0]
        return (args[0][..., :0, :].detach(), *args[1:])

    def _compute(self, module: nn.Linear, args: tuple[Any, ...]) -> None:
        if self._hidden is None or self.targets is None:
            return
        hidden, targets, self._hidden, self.targets = self._hidden, self.targets, None, None
        self._loss = linear_cross_entropy(hidden.flatten(0, -2), module.weight, module.bias, targets)
