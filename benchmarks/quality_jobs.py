"""The cells of ``quality.py`` and what all of them have in common: sizes, steps, rows and the form of a job."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quality_tasks import task_sections

P, HIDDEN = 30, 512
"""Virtual tokens of every prompt whose method names no other number; width of a prefix's MLP."""


STEPS, BATCH_ROWS, WARM_UP, MAX_LENGTH, MAX_NEW_TOKENS = 80, 8, 0.05, 256, 80


EVAL_ROWS = 16


NAMES = ("side", "method", "task", "rate", "seed")
"""The fields that identify a row."""


UNTRAINED = ("frozen", "hard_prompt")


TRAINED_HEAD = ("head", "p_tuning_v2")
"""Methods that use a trained head for labels on the causal model too; on the encoder, all methods do."""


@dataclass(frozen=True)
class Cell:
    """A training run. ``rate`` is the name of its learning rate; ``learning_rate`` None means ptd's own default."""

    side: str
    method: str
    task: str
    rate: str
    seed: int
    learning_rate: float | None

    @property
    def name(self) -> dict[str, Any]:
        """The fields, with their values, that identify a record of this cell."""
        return {field: getattr(self, field) for field in NAMES}

    @property
    def words(self) -> str:
        """The text that ``--only`` searches."""
        return f"{self.side} {self.method} {self.task} {self.rate}"


@dataclass(frozen=True)
class Job:
    """A cell with the folders of its backbone and its rows (`quality_tasks.write_material`), and a working folder.

    ``overrides``, only for ptd: keys of a run file, including the method's keys, which replace the settings of
    ``cell.method``. ``texts``: whether the cell of E2E also generates and scores texts.
    """

    cell: Cell
    backbone: str
    data: str
    folder: str
    steps: int = STEPS
    overrides: tuple[str, ...] = ()
    texts: bool = True

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(file: Path) -> Job:
        found = json.loads(file.read_text(encoding="utf-8"))
        return Job(**{**found, "cell": Cell(**found["cell"]), "overrides": tuple(found["overrides"])})


def labels_by_head(method: str, task: str) -> bool:
    """Return whether a trained head predicts the labels of this task."""
    return task == "sst2-encoder" or (task == "sst2" and method in TRAINED_HEAD)


def sections_of(job: Job) -> dict[str, dict[str, Any]]:
    """Return ptd's ``task`` and ``data`` sections for the cell."""
    sections = task_sections(job.cell.task, trained_head=labels_by_head(job.cell.method, job.cell.task))
    return {"task": sections["task"], "data": {**sections["data"], "max_length": MAX_LENGTH}}


def bytes_of(folder: Path) -> int:
    """Return the size in bytes of the weights in an adapter's folder."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
