"""Learn and check ``task.class_weights``, the weight of each label in the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from ptd.types import UserError

Given = Literal["balanced"] | dict[str, float] | None


def learn_weights(given: Given, labels: Sequence[str], counts: Mapping[str, int]) -> dict[str, float] | None:
    """Return the weights of the labels that occur; None: every weight is 1.

    ``balanced``: n / (k · count) for the k labels that occur n times in all (scikit-learn's formula).
    """
    if given != "balanced":
        return given
    seen = {label: counts[label] for label in labels if counts.get(label)}
    return {label: sum(seen.values()) / (len(seen) * count) for label, count in seen.items()}


def check_weights(given: Given, labels: Sequence[str]) -> None:
    """Raise `UserError` for a weight of a name that is not a label, or that is not a positive finite number."""
    for label, weight in {} if given is None or given == "balanced" else given.items():
        if labels and label not in labels:
            raise UserError(f"task.class_weights: {label!r} is not a label; the labels are {', '.join(labels)}")
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"task.class_weights.{label}: {weight} is not a weight; give a number above 0")
