"""Define what the sides of a benchmark share: a measured optimizer step, and which rows make a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ptd.config import RunConfig
from ptd.types import Examples

Setting = Literal["as-run", "best", "compiled"]
_KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
ENVIRONMENT: dict[Setting, dict[str, str]] = {"as-run": {}, "best": _KEPT, "compiled": _KEPT}
"""glibc's settings for PEFT's process without a GPU: freed memory is kept instead of returned to the system."""


def settings_for(config: RunConfig) -> tuple[Setting, ...]:
    """Return the default settings of PEFT for a comparison; ``compiled`` only if the run compiles its own layers."""
    return ("as-run", "best", "compiled") if config.backbone.compile is True else ("as-run", "best")


@dataclass(frozen=True)
class Workload:
    """What PEFT's side starts from.

    ``prompt``: the parameters of ptd's prompt encoder by name; ``fields``: fields of PEFT's configuration;
    ``attention``: the backbone's attention layers.
    """

    examples: Examples
    pad_token_id: int
    prompt: dict[str, np.ndarray]
    peft_type: str
    fields: dict[str, Any]
    attention: tuple[Any, ...]


@dataclass(frozen=True)
class StepTiming:
    """One optimizer step. ``tokens``: useful tokens, without padding; ``flops``: of this process; None: not counted."""

    seconds: float
    phases: dict[str, float]
    tokens: int
    supervised_tokens: int
    loss: float
    peak_bytes: int
    positions: int
    flops: int | None


@dataclass(frozen=True)
class Facts:
    """What a side reports about itself before anything is timed.

    ``uncounted``: why its FLOPs are not counted; ``obstacle``: why PEFT cannot do the same work.
    """

    device: str
    dtype: str
    threads: int
    settings: dict[str, Any]
    uncounted: str | None = None
    rows: int = 0
    obstacle: str | None = None


Schedule = Callable[[int], np.ndarray]
"""A function from a step to its rows."""


def length_grouped(lengths: np.ndarray, rows_per_step: int, seed: int) -> Schedule:
    """Return a schedule of rows sorted by ``lengths`` and cut into steps, which are shuffled again in each epoch.

    The step with the longest rows comes first, so that its memory is allocated from then on. The shortest rows are left
    out if the rows do not divide into whole steps.
    """
    rows_per_step = min(rows_per_step, len(lengths))
    ascending = np.argsort(lengths, kind="stable")
    steps = ascending[len(ascending) % rows_per_step :].reshape(-1, rows_per_step)

    def rows(step: int) -> np.ndarray:
        epoch, index = divmod(step, len(steps))
        order = np.random.default_rng([seed, epoch]).permutation(len(steps))
        order = np.concatenate([[len(steps) - 1], order[order != len(steps) - 1]])
        taken: np.ndarray = steps[order[index]]
        return taken

    return rows
