"""Compute figures from samples: medians, quartiles, shares, and ratios of pairs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ptd.bench.sides import StepTiming
from ptd.engine.phases import PHASES


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return ``median`` and ``quartiles``; of a single value, all are that value."""
    if len(values) < 2:
        return {"median": values[0], "quartiles": [values[0], values[0]]}  # type: ignore[dict-item]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "quartiles": [low, high]}  # type: ignore[dict-item]


def side_figures(samples: Sequence[StepTiming], matmul: float | None) -> dict[str, Any]:
    """Return the figures of one side's timed steps. ``matmul``: FLOP/s of a matrix product on this machine.

    Phases and step times are means, so that the phases add up to the step; token rates are medians over steps.
    """
    seconds = [sample.seconds for sample in samples]
    flops = [sample.flops for sample in samples if sample.flops is not None]
    rate = sum(flops) / sum(seconds) if len(flops) == len(samples) else None
    tokens, positions = (sum(getattr(sample, name) for sample in samples) for name in ("tokens", "positions"))
    return {
        "useful_tokens_per_second": spread([sample.tokens / sample.seconds for sample in samples]),
        "supervised_tokens_per_second": spread([sample.supervised_tokens / sample.seconds for sample in samples]),
        "step_seconds": statistics.fmean(seconds),
        "phase_seconds": {
            name: statistics.fmean([sample.phases.get(name, 0.0) for sample in samples]) for name in PHASES
        },
        "tokens_per_step": tokens / len(samples),
        "supervised_share": sum(sample.supervised_tokens for sample in samples) / tokens,
        "padding_share": max(0.0, 1 - tokens / positions),
        "flops_per_step": statistics.fmean(flops) if rate is not None else None,
        "flops_per_second": rate,
        "share_of_matmul_rate": None if rate is None or matmul is None else rate / matmul,
        "peak_memory_bytes": max(sample.peak_bytes for sample in samples),
        "all_step_seconds": [round(value, 6) for value in seconds],
    }


def ratios(mine: Sequence[StepTiming], theirs: Sequence[StepTiming]) -> dict[str, float]:
    """Return the ratios of useful tokens per second over pairs of steps; the steps of a pair had the same rows."""
    rate: Callable[[StepTiming], float] = lambda sample: sample.tokens / sample.seconds  # noqa: E731
    return spread([rate(one) / rate(other) for one, other in zip(mine, theirs, strict=True)])
