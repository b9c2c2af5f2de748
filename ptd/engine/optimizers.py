"""The optimizers that ``train.optimizer`` can name: AdamW, AdamW with 8-bit moments, and Lion.

An optimizer here is a ``torch.optim.Optimizer`` whose state of each parameter is a mapping of tensors. ``new_state``
makes that state before the first step, so that a resumed run can load it in place (`ptd.checkpoint.run_state`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptd.checkpoint.run_state import ResumableOptimizer
from ptd.engine import adamw_8bit, lion


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` (Loshchilov & Hutter 2019, arXiv:1711.05101): two fp32 numbers per trained number."""

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state before the first step, as torch's first step would make it."""
        # Fused and capturable AdamW reads the step count on the parameter's device; other variants read it on the CPU.
        counted_there = any(
            parameter is other
            for group in self.param_groups
            if group.get("fused") or group.get("capturable")
            for other in group["params"]
        )
        where = parameter.device if counted_there else torch.device("cpu")
        return {
            "step": torch.zeros((), dtype=torch.float32, device=where),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


@dataclass(frozen=True)
class Offered:
    """An optimizer that ``train.optimizer`` can name.

    ``build``: makes it from parameter groups and settings. ``state_bytes``: bytes of state per trained number.
    ``rate``: its learning rate per ``train.learning_rate``, so that one setting suits every optimizer. ``check``:
    raises `UserError` unless the optimizer runs on a device of this type; None: unless it is installed.
    """

    build: Callable[..., ResumableOptimizer]
    state_bytes: float
    rate: float = 1.0
    check: Callable[[str | None], None] = lambda device: None


def _adamw(groups: list[dict[str, Any]], *, epsilon: float, on_gpu: bool, **given: Any) -> AdamW:
    kernels: dict[str, Any] = {"fused": True} if on_gpu else {"foreach": True}
    return AdamW(groups, eps=epsilon, **given, **kernels)


def _adamw_8bit(groups: list[dict[str, Any]], *, epsilon: float, on_gpu: bool, **given: Any) -> adamw_8bit.AdamW8bit:
    return adamw_8bit.AdamW8bit(groups, eps=epsilon, **given)


def _lion(groups: list[dict[str, Any]], *, epsilon: float, on_gpu: bool, **given: Any) -> lion.Lion:
    return lion.Lion(groups, **given)


OPTIMIZERS = {
    "adamw": Offered(_adamw, state_bytes=8),
    "adamw_8bit": Offered(_adamw_8bit, state_bytes=adamw_8bit.STATE_BYTES, check=adamw_8bit.check),
    "lion": Offered(_lion, state_bytes=lion.STATE_BYTES, rate=lion.RATE),
}
"""The values of ``train.optimizer``."""
