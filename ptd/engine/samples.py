"""``samples.jsonl``: what a run's model makes of some held-out rows, before the training and after it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptd.checkpoint.files import write_atomically, writing
from ptd.types import Sample

SAMPLES = "samples.jsonl"


def write_samples(folder: Path, step: int, samples: Sequence[Sample]) -> None:
    """Keep what was seen at ``step``, in place of what the file has of this step and later ones.

    Raises `UserError` where that cannot be written.
    """
    kept = [sample for sample in read_samples(folder) if sample["step"] < step]
    for sample in samples:
        kept.append({"step": step, **{name: value for name, value in vars(sample).items() if value is not None}})
    with writing(folder):
        write_atomically(folder / SAMPLES, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in kept))


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The samples of a run's folder, those of one step together; lines of another form are left out.

    Each has ``step`` and the fields of `ptd.types.Sample`; text that was written lacks ``score`` and ``right``.
    """
    path = folder / SAMPLES
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            sample = json.loads(line)
        except ValueError:
            continue
        if _is_sample(sample):
            found.append(sample)
    return found


def _is_sample(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("step"), int):
        return False
    words = all(isinstance(value.get(name), str) for name in ("prompt", "reference", "text"))
    if "score" not in value and "right" not in value:
        return words
    score, right = value.get("score"), value.get("right")
    return words and isinstance(score, float) and math.isfinite(score) and isinstance(right, bool)
