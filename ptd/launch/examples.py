"""The example scripts in ``launch/slurm``, to be read or copied: ``python -m ptd.launch.examples`` rewrites them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ptd.launch.program import Program
from ptd.launch.slurm import Job, render_script
from ptd.shipped import SLURM

PROJECT = Path("/path/to/project")
EIGHT_GPUS = Job(
    Program(PROJECT / "run.yaml"),
    nodes=1,
    gpus_per_node=8,
    ranks_per_node=8,
    chdir=PROJECT,
    log_dir=PROJECT / "out" / "logs",
    options={"time": "12:00:00", "cpus-per-task": "8"},
    python="/path/to/.venv/bin/python",
)
SWEEP = tuple(
    (f"train.learning_rate={rate}", f"output_dir=out/{index}")
    for index, rate in enumerate(("1.5e-2", "5e-2", "1.5e-1"))
)
EXAMPLES = {
    "single_node.sbatch": EIGHT_GPUS,
    "multi_node.sbatch": replace(EIGHT_GPUS, nodes=4),
    "array_sweep.sbatch": replace(EIGHT_GPUS, sweep=SWEEP),
    "requeue.sbatch": replace(
        EIGHT_GPUS, nodes=4, requeue=True, program=Program(PROJECT / "run.yaml", ("train.save_steps=100",))
    ),
}

if __name__ == "__main__":
    for name, job in EXAMPLES.items():
        (SLURM / name).write_text(render_script(job), encoding="utf-8")
