"""What the sides of a benchmark have in common: one optimizer step as it was measured, and which rows make a step."""

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
"""glibc's settings for PEFT's process where there is no GPU: freed memory is kept instead of given back."""


def settings_for(config: RunConfig) -> tuple[Setting, ...]:
    """PEFT's settings that a run is compared with unless others are asked for: ``compiled`` if its own layers are."""
    return ("as-run", "best", "compiled") if config.backbone.compile else ("as-run", "best")


@dataclass(frozen=True)
class Material:
    """What PEFT's side starts from.

    ``prompt``: ptd's prompt encoder, by parameter name; ``fields``: of PEFT's configuration; ``attention``: the
    backbone's layers.
    """

    examples: Examples
    pad_token_id: int
    prompt: dict[str, np.ndarray]
    peft_type: str
    fields: dict[str, Any]
    attention: tuple[Any, ...]


@dataclass(frozen=True)
class Sample:
    """One optimizer step. ``tokens`` are useful ones, without padding; ``flops`` those of this process, if counted."""

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
    """What a side says of itself before anything is timed.

    ``uncounted``: why its FLOPs are not; ``obstacle``: why PEFT has nothing to compare with.
    """

    device: str
    dtype: str
    threads: int
    settings: dict[str, Any]
    uncounted: str | None = None
    rows: int = 0
    obstacle: str | None = None


Schedule = Callable[[int], np.ndarray]
"""Step -> its rows."""


def length_grouped(lengths: np.ndarray, rows_per_step: int, seed: int) -> Schedule:
    """Rows sorted by their ``lengths``, cut into steps, and the steps shuffled, anew in each epoch.

    The longest rows are the first step: what they need is then allocated. As many rows as make whole steps are used.
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
