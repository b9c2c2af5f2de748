"""Write and read ``samples.jsonl``: the model's outputs for some held-out rows, before and after training."""

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
    """Write the samples of ``step``; they replace those of this step and of later steps in the file.

    Raises `UserError` if the file cannot be written.
    """
    kept = [sample for sample in read_samples(folder) if sample["step"] < step]
    for sample in samples:
        kept.append({"step": step, **{name: value for name, value in vars(sample).items() if value is not None}})
    with writing(folder):
        write_atomically(folder / SAMPLES, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in kept))


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Return the samples of a run's folder, grouped by step; lines of another form are skipped.

    Each has ``step`` and the fields of `ptd.types.Sample`; generated text has no ``score`` and no ``right``.
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
