"""Write the records of a run: ``metrics.jsonl``, and the same numbers to its trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ptd.checkpoint.files import write_atomically, writing
from ptd.trackers import Status, Tracker
from ptd.types import Preempted

METRICS = "metrics.jsonl"


class Records:
    """Writer of the records of a run, on rank 0.

    Training records have ``loss``, evaluations ``eval_loss``. The measurements of the frozen backbone without a prompt,
    before step 1, are one record of step 0 with keys that begin with ``frozen_``.

    A resume at ``after_step`` drops the records of later steps, because the run will write them again; with
    ``evaluation_due`` also the evaluation of that step. As a context manager it closes ``trackers`` when the run ends
    or fails.
    """

    def __init__(
        self, folder: Path, after_step: int, *, evaluation_due: bool = False, trackers: Sequence[Tracker] = ()
    ) -> None:
        self._trackers = trackers
        self.path = folder / METRICS
        self._keep(after_step, evaluation_due)

    def go_back(self, after_step: int, trackers: Sequence[Tracker], *, evaluation_due: bool = False) -> None:
        """Drop the records after ``after_step``, from which training continues with other settings.

        Closes the current trackers; ``trackers`` receive the next records. Raises `UserError` if the file cannot be
        written.
        """
        self.close("failed")
        self._trackers = trackers
        with writing(self.path):
            self._keep(after_step, evaluation_due)

    def _keep(self, after_step: int, evaluation_due: bool) -> None:
        kept = [record for record in read_records(self.path.parent) if record["step"] <= after_step]
        if evaluation_due:
            kept = [record for record in kept if record["step"] < after_step or "eval_loss" not in record]
        write_atomically(self.path, "".join(_line(record) for record in kept))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record (non-finite numbers as null), and log its numbers to the trackers under its ``step``.

        Raises `UserError` if the file cannot be written.
        """
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        numbers = {key: value for key, value in record.items() if key != "step" and isinstance(value, (int, float))}
        for tracker in self._trackers:
            tracker.log(record["step"], numbers)

    def close(self, status: Status = "finished") -> None:
        for tracker in self._trackers:
            tracker.close(status)

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close("finished" if error is None else "preempted" if isinstance(error, Preempted) else "failed")


def _line(record: dict[str, Any]) -> str:
    # JSON has no NaN; most readers refuse the NaN that Python writes.
    finite = {key: value for key, value in record.items() if not isinstance(value, float) or math.isfinite(value)}
    valid = {key: finite.get(key) for key in record}
    return json.dumps(valid) + "\n"


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return all complete records of a run's folder, oldest first (without a line that a crash cut short)."""
    records = []
    path = folder / METRICS
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
