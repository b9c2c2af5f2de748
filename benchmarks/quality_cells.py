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
from pathlib import Path
from typing import Any

from quality_jobs import Job
from quality_tasks import TASKS


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
