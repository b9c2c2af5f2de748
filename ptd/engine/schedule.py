"""The learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers import get_scheduler

from ptd.config import TrainConfig
from ptd.types import UserError


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Return the number of steps in which the learning rate rises."""
    return config.warmup_steps if config.warmup_steps is not None else math.ceil(config.warmup_ratio * total_steps)


def learning_rates(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """Return transformers' schedule as a function from step index to learning rate, so that resuming needs no state.

    Raises `UserError` if transformers cannot build the schedule.
    """
    warmup = warmup_steps(config, total_steps)
    # The polynomial schedule reads the learning rate of the optimizer.
    probe = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=config.learning_rate)
    try:
        schedule = get_scheduler(
            config.lr_scheduler_type, probe, num_warmup_steps=warmup, num_training_steps=total_steps
        )
    except ValueError as error:
        raise UserError(
            f"train.lr_scheduler_type: transformers cannot build the schedule {config.lr_scheduler_type}: {error}; "
            "choose another schedule"
        ) from error
    return lambda step: config.learning_rate * schedule.lr_lambdas[0](step)
