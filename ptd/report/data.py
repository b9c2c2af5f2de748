"""Read a run's folder as plain data, whatever state the run is in; entries of unexpected form are left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptd.runs.metrics_log import METRICS, read_records
from ptd.runs.samples_log import read_samples
from ptd.types import UserError

Record = dict[str, Any]
ALONE, TRAIN_ALONE = "frozen_", "frozen_train_loss"
"""Prefix of the names of figures of the frozen backbone, and the one that is not measured on held-out rows."""


@dataclass(frozen=True)
class RecordedRun:
    """``facts`` is run.json; ``steps`` and ``evaluations`` are the two kinds of records, oldest first; ``alone`` holds
    the figures of the frozen backbone, without a prompt, under the names of an evaluation."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    steps: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    alone: Record = field(default_factory=dict)

    def section(self, name: str) -> dict[str, Any]:
        """Return a mapping of run.json, or an empty one."""
        return _mapping(self.facts.get(name))

    def config(self, section: str, key: str) -> Any:
        """Return a value of the resolved configuration, or None."""
        return _mapping(self.section("config").get(section)).get(key)

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """The run's starts, oldest first."""
        listed = self.facts.get("attempts")
        return [_mapping(each) for each in listed] if isinstance(listed, list) else []

    def last(self, key: str, records: Sequence[Record] | None = None) -> float | None:
        """Return the newest number under ``key`` in ``records`` (None: the records of steps), or None."""
        found = numbers(self.steps if records is None else records, key)
        return found[-1][1] if found else None


def numbers(records: Iterable[Record], key: str) -> list[tuple[int, float]]:
    """Return step and value of the records that have a finite number under ``key``."""
    return [(record["step"], record[key]) for record in records if is_number(record.get(key))]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_run(folder: Path, name: str | None = None) -> RecordedRun:
    """Read a run's folder. Raises `UserError` if it has neither run.json nor metrics.jsonl, or they are unreadable."""
    file = folder / "run.json"
    if not file.is_file() and not (folder / METRICS).is_file():
        what = "there is no such folder" if not folder.is_dir() else f"it has neither run.json nor {METRICS}"
        raise UserError(f"cannot report on {folder}: {what}; give the output_dir of a run")
    try:
        facts = _mapping(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
        records = [_mapping(record) for record in read_records(folder)]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot report on {folder}: {error}") from error
    placed = [record for record in records if isinstance(record.get("step"), int)]
    return RecordedRun(
        name or folder.resolve().name,
        facts,
        [record for record in placed if "loss" in record],
        [record for record in placed if "eval_loss" in record],
        read_samples(folder),
        {
            f"eval_{key.removeprefix(ALONE)}": value
            for record in placed
            for key, value in record.items()
            if key.startswith(ALONE) and key != TRAIN_ALONE
        },
    )


def read_runs(folders: Sequence[Path]) -> list[RecordedRun]:
    """Read runs, and name them by the shortest ends of their paths that differ. Raises `UserError` for duplicates."""
    places = [folder.resolve() for folder in folders]
    twice = sorted({str(place) for place in places if places.count(place) > 1})
    if twice:
        raise UserError(f"{twice[0]} is given twice; name each run once")
    deepest = max(len(place.parts) for place in places)
    lengths = range(1, deepest + 1)
    length = next(n for n in lengths if len({place.parts[-n:] for place in places}) == len(places))
    return [read_run(folder, "/".join(place.parts[-length:])) for folder, place in zip(folders, places, strict=True)]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
