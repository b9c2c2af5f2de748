"""Run one cell of ``benchmarks/quality.py``: train a method on a task and measure it on held-out rows, by ptd or PEFT.

``python benchmarks/quality_cells.py JOB.json RESULT.json`` runs the cell in this process. Both sides train on the same
rows in the same order, for the same number of steps, with AdamW (weight decay 0), warm-up, linear decay to 0 and
gradients clipped to norm 1. The backbone has its stored dtype; the trained parameters are fp32 (`quality_ptd`,
`quality_peft`).
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quality_tasks import TASKS, task_sections

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


def run_cell(job: Job) -> dict[str, Any]:
    """Train and measure the cell.

    Returns ``loss`` on the test sample (nats per supervised token for E2E, per row for the other tasks) and
    ``development_loss``; for E2E ``bleu`` and ``slots``, for the other tasks ``accuracy`` and ``development_accuracy``
    (all 0 to 100); ``trained_parameters``, ``adapter_bytes`` (the adapter's weights on disk), ``seconds`` in optimizer
    steps, ``tokens_per_second`` over these seconds (useful tokens, neither padding nor virtual tokens),
    ``peak_memory_bytes`` of the process during training, and ``learning_rate``, the peak rate (None without training).
    """
    if job.cell.side == "ptd":
        from quality_ptd import run_ptd

        return run_ptd(job)
    from quality_peft import run_peft

    return run_peft(job)


def sections_of(job: Job) -> dict[str, dict[str, Any]]:
    """Return ptd's ``task`` and ``data`` sections for the cell."""
    sections = task_sections(job.cell.task, trained_head=labels_by_head(job.cell.method, job.cell.task))
    return {"task": sections["task"], "data": {**sections["data"], "max_length": MAX_LENGTH}}


def bytes_of(folder: Path) -> int:
    """Return the size in bytes of the weights in an adapter's folder."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def main() -> None:
    job = Job.read(Path(sys.argv[1]))
    assert job.cell.task in TASKS
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    Path(sys.argv[2]).write_text(json.dumps(run_cell(job)), encoding="utf-8")


if __name__ == "__main__":
    main()
