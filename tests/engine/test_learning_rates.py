"""The schedule as a function of the step equals transformers' scheduler, stepped as in transformers' Trainer."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from ptd.config import TrainConfig
from ptd.engine.schedule import learning_rates

TYPES = get_args(TrainConfig.model_fields["lr_scheduler_type"].annotation)
STEPS = 23


def stepped(name: str, warmup_steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=3e-3)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=STEPS)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize("name", TYPES)
def test_learning_rates_are_transformers_own(name: str, warmup_steps: int) -> None:
    config = TrainConfig(learning_rate=3e-3, lr_scheduler_type=name, warmup_steps=warmup_steps)
    rate = learning_rates(config, STEPS)
    assert [rate(step) for step in range(STEPS)] == stepped(name, warmup_steps)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3, 0.999])
def test_warmup_ratio_is_rounded_as_transformers_does(
    ratio: float, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Set for DeepSpeed by a process group of an earlier test; TrainingArguments would start one of its own.
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    theirs = TrainingArguments(output_dir=str(tmp_path), warmup_steps=ratio).get_warmup_steps(STEPS)
    by_ratio = learning_rates(TrainConfig(warmup_ratio=ratio), STEPS)
    by_steps = learning_rates(TrainConfig(warmup_steps=theirs), STEPS)
    assert [by_ratio(step) for step in range(STEPS)] == [by_steps(step) for step in range(STEPS)]


def test_warmup_steps_take_precedence_over_the_ratio() -> None:
    rate = learning_rates(TrainConfig(warmup_ratio=0.5, warmup_steps=0), STEPS)
    assert rate(0) == TrainConfig().learning_rate
