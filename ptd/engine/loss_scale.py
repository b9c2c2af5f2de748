"""Dynamic loss scaling: keep the gradients of a float16 backbone from being rounded to zero.

The loss is multiplied by a power of two before the backward pass and the gradients are divided by it after the
reduction; both operations are exact (Micikevicius et al. 2018, arXiv:1710.03740, §3.2). The scale falls when a gradient
overflows and rises after a window of steps without an overflow, with the values of ``torch.amp.GradScaler``.

GradScaler itself unscales the gradients of the optimizer's parameters. Here the gradients have to be unscaled at the
prompt, before the encoder's backward pass, and `PromptStep.finish` decides once for all ranks whether a step is
skipped. GradScaler cannot be told of that decision, and its own check refuses an encoder that mixes sharded (DTensor)
and replicated parameters. [torch 2.13: "got mixed torch.Tensor and DTensor"]
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 2.0**64
"""Upper limit: more than any run needs, and far enough below fp32's limit for sums over all micro-batches and ranks."""


class LossScale:
    """The loss scale and the rule by which it changes.

    Args:
        power: the scale starts at ``2 ** power``.
        window: consecutive steps without an overflow after which the scale doubles; None: the scale never changes.
    """

    def __init__(self, power: int = 16, window: int | None = 2000) -> None:
        self.window = window
        self._value = torch.tensor(2.0**power, dtype=torch.float32)
        self._good_steps = torch.tensor(0, dtype=torch.int64)

    @classmethod
    def none(cls) -> LossScale:
        """Return a constant scale of 1 with no state to save, for backbones in any other dtype."""
        return cls(power=0, window=None)

    def to(self, device: torch.device) -> LossScale:
        """Move the scale to ``device``, where the losses are, so that no step reads it on the host or copies it."""
        self._value, self._good_steps = self._value.to(device), self._good_steps.to(device)
        return self

    @property
    def value(self) -> float:
        """The scale, a power of two. On a GPU reading it waits for the device."""
        return float(self._value)

    @property
    def used(self) -> bool:
        """Whether losses are scaled at all."""
        return self.window is not None

    def now(self) -> Tensor:
        """Return a copy of the current value, which later calls of `update` do not change."""
        return self._value.clone()

    def apply(self, loss: Tensor) -> Tensor:
        """Return the loss multiplied by the scale, to run the backward pass from."""
        return loss * self._value if self.used else loss

    def update(self, *, finite: Tensor | bool, known: Tensor | bool = True) -> Tensor:
        """Adjust the scale after a step, by whether its gradients were ``finite``; change nothing if not ``known``.

        Returns whether the scale was lowered (bool).
        """
        finite, known = (torch.as_tensor(flag, device=self._value.device) for flag in (finite, known))
        if self.window is None:
            return torch.zeros_like(finite)
        lowered = known & ~finite & (self._value > 1)
        good_steps = torch.where(finite, self._good_steps + 1, 0)
        rises = good_steps == self.window
        value = torch.where(finite, torch.where(rises, self._value * 2, self._value), self._value / 2)
        self._value.copy_(torch.where(known, value.clamp(1, LARGEST), self._value))
        self._good_steps.copy_(torch.where(known, good_steps.masked_fill(rises, 0), self._good_steps))
        return lowered

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a resumed run loads in place, by name; an empty dict without a scale."""
        return {"loss_scale.value": self._value, "loss_scale.good_steps": self._good_steps} if self.used else {}
