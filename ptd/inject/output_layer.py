"""The output layer of a language model: it computes logits, or the cross-entropies of given tokens without logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ptd_kernels import linear_cross_entropy
from ptd_kernels.linear_cross_entropy import DTYPES
from torch import Tensor, nn


@dataclass
class PassOutput:
    """What a forward pass computes at its end: goes in with ``positions`` and ``targets``, comes out with ``losses``.

    ``positions`` ``[n]``: flattened positions at which the last hidden states are needed, each given once; all others
    are dropped. ``targets`` ``[n]``: the tokens at these positions; a language model with `OutputLayer.fuses` then
    computes their cross-entropies (fp32 ``[n]``) as ``losses`` and returns no logits.
    """

    positions: Tensor
    targets: Tensor | None = None
    losses: Tensor | None = None


class OutputLayer:
    """Hooks on the layer whose output is, unchanged, the model's logits; ``module`` None: the model has no such layer.

    In a pass with targets (``wanted``) they compute the cross-entropies from the layer's input, and the model returns
    no logits. DeepSpeed's hooks run between the two hooks here. They see an input without rows or gradient, so the
    backward pass does not gather the weight again. After they have run, the weight is gathered.
    """

    def __init__(self, module: nn.Linear | None) -> None:
        self.module = module
        self.wanted: PassOutput | None = None
        self._hidden: Tensor | None = None
        self._hooks: list[Any] = []

    @property
    def fuses(self) -> bool:
        """Whether the layer can compute cross-entropies: its weight is frozen and of a dtype that needs no scale."""
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

    def _divert(self, module: nn.Linear, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.wanted is None or self.wanted.targets is None:
            return None
        self._hidden = args[0]
        return (args[0][..., :0, :].detach(), *args[1:])

    def _compute(self, module: nn.Linear, args: tuple[Any, ...]) -> None:
        hidden, self._hidden = self._hidden, None
        if hidden is None or self.wanted is None or self.wanted.targets is None:
            return
        self.wanted.losses = linear_cross_entropy(
            hidden.flatten(0, -2), module.weight, module.bias, self.wanted.targets
        )
