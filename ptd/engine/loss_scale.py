"""Dynamic loss scale: keeps the gradients of a float16 backbone above what float16 rounds to zero.

The loss is multiplied by a power of two before the backward pass and the gradients are divided by it after the
reduction, which is exact (Micikevicius et al. 2018, arXiv:1710.03740, §3.2). The scale falls when a gradient overflows
and rises after a window of steps without, with the values of ``torch.amp.GradScaler``.

GradScaler itself is for gradients at the optimizer's parameters. Here they have to be unscaled at the prompt, before
the encoder's backward, and whether a step is skipped is decided once for all ranks (`PromptStep.finish`); it cannot be
told of that decision, and its own check refuses an encoder with split beside whole parameters. [torch 2.13: "got mixed
torch.Tensor and DTensor"]
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 2.0**64
"""Beyond any use, and far enough from fp32's limits for the sum over all micro-batches and ranks."""


class LossScale:
    """The scale and what it is to become.

    Args:
        power: the scale starts at ``2 ** power``.
        window: good steps in a row after which it is doubled; None: it never is.
    """

    def __init__(self, power: int = 16, window: int | None = 2000) -> None:
        self.window = window
        self._value = torch.tensor(2.0**power, dtype=torch.float32)
        self._good_steps = torch.tensor(0, dtype=torch.int64)

    @classmethod
    def none(cls) -> LossScale:
        """For backbones in any other dtype: 1 for ever, and nothing to keep."""
        return cls(power=0, window=None)

    def to(self, device: torch.device) -> LossScale:
        """Keep it on ``device``, where the losses are: the host neither reads nor copies it in a step."""
        self._value, self._good_steps = self._value.to(device), self._good_steps.to(device)
        return self

    @property
    def value(self) -> float:
        """A power of two. On a GPU this waits for it."""
        return float(self._value)

    @property
    def used(self) -> bool:
        """Whether there is a scale at all."""
        return self.window is not None

    def now(self) -> Tensor:
        """The value as a scalar of its own, which keeps what `update` changes."""
        return self._value.clone()

    def apply(self, loss: Tensor) -> Tensor:
        """The loss to run backward from."""
        return loss * self._value if self.used else loss

    def update(self, *, finite: Tensor | bool, known: Tensor | bool = True) -> Tensor:
        """Take note of a step whose gradients were ``finite`` or not, unless that is not ``known``.

        Returns whether it lowered the scale (bool).
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
        """What a resumed run needs, to be loaded in place; nothing without a scale."""
        return {"loss_scale.value": self._value, "loss_scale.good_steps": self._good_steps} if self.used else {}
