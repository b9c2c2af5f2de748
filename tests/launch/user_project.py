"""The run that the tests of this folder start in several ways, and how they call ``ptd launch``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from ptd.quickstart import BACKBONE
from ptd.quickstart.task import write_task

ROOT = Path(__file__).parents[2]
# Everything that a shell, sbatch, srun, YAML or Jinja might take for its own.
HOSTILE = "{prompt} $(touch pwned) `touch pwned` \"; touch pwned; ' %j %t {{ x }} \\ # ü\n\n"


def make_project(folder: Path) -> None:
    """Rows and a run file of ten steps over ZeRO-3, its paths relative."""
    write_task(folder)
    run: dict[str, Any] = {
        "backbone": {"path": str(BACKBONE), "dtype": "float32"},
        "method": {"name": "prefix", "num_virtual_tokens": 8, "prefix_projection": True, "encoder_hidden_size": 32},
        "data": {"train": "train.jsonl", "max_length": 256, "prompt_template": HOSTILE},
        "train": {"max_steps": 10, "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 7e-3},
        "deepspeed": "zero3.json",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")


def command(*arguments: str | Path) -> list[str]:
    """``ptd launch …``"""
    return [sys.executable, "-m", "ptd.cli", "launch", *map(str, arguments)]


def environment(given: dict[str, str] | None = None, **variables: str) -> dict[str, str]:
    """In which this clone's ptd is found, from any folder."""
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return {**(dict(os.environ) if given is None else given), **paths, **variables}


def launch(*arguments: str | Path, folder: Path, given: dict[str, str] | None = None) -> Any:
    """The command when it has ended; ``given`` is the environment it starts with."""
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(given),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
