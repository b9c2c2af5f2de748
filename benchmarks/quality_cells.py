"""One cell of ``benchmarks/quality.py``: a method trained on a task and measured on held-out rows, by ptd or by PEFT.

``python benchmarks/quality_cells.py JOB.json RESULT.json`` runs a cell in this process. Every side trains on the same
rows in the same order, for the same number of steps, with AdamW (weight decay 0), warm-up, linear decay to 0 and
gradients clipped to norm 1; the backbone has the dtype it is stored in, what is trained is fp32 (`quality_ptd`,
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
"""Virtual tokens of every prompt; width of the MLP of a prefix."""
STEPS, BATCH_ROWS, WARM_UP, MAX_LENGTH, MAX_NEW_TOKENS = 80, 8, 0.05, 256, 80
EVAL_ROWS = 16
NAMES = ("side", "method", "task", "rate", "seed")
"""What a row is of."""
UNTRAINED = ("frozen", "hard_prompt")
TRAINED_HEAD = ("head", "p_tuning_v2")
"""Methods that label by a trained head on the causal model, too; on the encoder all do."""


@dataclass(frozen=True)
class Cell:
    """A training run. ``rate``: which of the rates it is, by name; ``learning_rate`` None: ptd's own default."""

    side: str
    method: str
    task: str
    rate: str
    seed: int
    learning_rate: float | None

    @property
    def name(self) -> dict[str, Any]:
        """The fields that a record of this cell is known by."""
        return {field: getattr(self, field) for field in NAMES}

    @property
    def words(self) -> str:
        """What ``--only`` looks into."""
        return f"{self.side} {self.method} {self.task} {self.rate}"


@dataclass(frozen=True)
class Job:
    """A cell and where its backbone and its rows are (`quality_tasks.write_material`), and a folder to work in.

    ``overrides``: keys of a run file, with the method's, in place of what ``cell.method`` stands for; of ptd alone.
    ``texts``: whether the texts of E2E are measured, too.
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
    """Whether the labels of this task come from a trained head."""
    return task == "sst2-encoder" or (task == "sst2" and method in TRAINED_HEAD)


def run_cell(job: Job) -> dict[str, Any]:
    """Train and measure.

    Returns ``loss`` on the test sample (nats a supervised token of E2E, a row of the others) and ``development_loss``;
    of E2E ``bleu`` and ``slots``, of the others ``accuracy`` and ``development_accuracy`` (0 to 100);
    ``trained_parameters``, ``adapter_bytes`` (the weights of the adapter on disk), ``seconds`` of the optimizer steps
    alone, ``tokens_per_second`` of these (useful ones: no padding, no virtual tokens), ``peak_memory_bytes`` of the
    process while it trained, and ``learning_rate``, the peak that was used (None of what trains nothing).
    """
    if job.cell.side == "ptd":
        from quality_ptd import run_ptd

        return run_ptd(job)
    from quality_peft import run_peft

    return run_peft(job)


def sections_of(job: Job) -> dict[str, dict[str, Any]]:
    """ptd's ``task`` and ``data`` sections of the cell."""
    sections = task_sections(job.cell.task, trained_head=labels_by_head(job.cell.method, job.cell.task))
    return {"task": sections["task"], "data": {**sections["data"], "max_length": MAX_LENGTH}}


def bytes_of(folder: Path) -> int:
    """Of the weights that an adapter's folder holds."""
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
