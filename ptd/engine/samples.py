"""``samples.jsonl``: what a run's model writes for some held-out inputs, before the training and after it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptd.checkpoint.files import write_atomically, writing

SAMPLES = "samples.jsonl"
FIELDS = ("prompt", "reference", "text")


def write_samples(folder: Path, step: int, samples: Sequence[tuple[str, str, str]]) -> None:
    """Keep ``(prompt, reference, text)`` of ``step``, in place of what the file has of this step and later ones.

    Raises `UserError` where that cannot be written.
    """
    kept = [sample for sample in read_samples(folder) if sample["step"] < step]
    kept += [{"step": step, **dict(zip(FIELDS, sample, strict=True))} for sample in samples]
    with writing(folder):
        write_atomically(folder / SAMPLES, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in kept))


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The samples of a run's folder, those of one step together; lines of another form are left out."""
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
    return all(isinstance(value.get(name), str) for name in FIELDS)
