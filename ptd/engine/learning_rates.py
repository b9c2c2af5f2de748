"""The schedules of the learning rate, as functions of the step: a run that is resumed needs no state of theirs."""

from __future__ import annotations

import math
from collections.abc import Callable

from ptd.config import TrainConfig
from ptd.types import UserError

POLYNOMIAL_END = 1e-7
"""Where ``polynomial``, of power one, arrives."""
INVERSE_SQRT_SCALE = 10_000
"""Steps after which ``inverse_sqrt`` without a warm-up is at 1/√2."""


def learning_rates(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """Learning rate by step index (from 0), bit for bit that of ``transformers.get_scheduler``'s type of that name.

    Not taken from there: importing it imports peft, and with that bitsandbytes, a third of the time in which a rank
    starts. Raises `UserError` for ``polynomial`` from a rate that is not above its end.
    """
    peak, kind = config.learning_rate, config.lr_scheduler_type
    warmup = config.warmup_steps if config.warmup_steps is not None else math.ceil(config.warmup_ratio * total_steps)
    falling = max(1, total_steps - warmup)
    scale = warmup or INVERSE_SQRT_SCALE
    if kind == "polynomial" and peak <= POLYNOMIAL_END:
        raise UserError(
            f"train.lr_scheduler_type: polynomial falls to {POLYNOMIAL_END}, but train.learning_rate is {peak}; "
            "set a larger one, or another type"
        )
    behind_warmup: dict[str, Callable[[int], float]] = {
        "constant": lambda step: 1.0,
        "constant_with_warmup": lambda step: 1.0,
        "linear": lambda step: max(0.0, (total_steps - step) / falling),
        "cosine": lambda step: max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / falling)))),
        "polynomial": lambda step: ((peak - POLYNOMIAL_END) * (1 - (step - warmup) / falling) + POLYNOMIAL_END) / peak,
        "inverse_sqrt": lambda step: 1.0 / math.sqrt((step + scale - warmup) / scale),
    }
    factor = behind_warmup[kind]
    if kind == "constant":
        return lambda step: peak * factor(step)
    return lambda step: peak * (step / max(1, warmup) if step < warmup else factor(step))
