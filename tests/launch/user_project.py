"""The run that the tests in this folder start in several ways, and the functions that call ``ptd launch``."""

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
# Everything that a shell, sbatch, srun, YAML or Jinja might interpret.
HOSTILE = "{prompt} $(touch pwned) `touch pwned` \"; touch pwned; ' %j %t {{ x }} \\ # ü\n\n"


def make_project(folder: Path) -> None:
    """Write rows and the run file of ten steps with ZeRO-3; its paths are relative."""
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
    """Return the command ``ptd launch …``."""
    return [sys.executable, "-m", "ptd.cli", "launch", *map(str, arguments)]


def environment(given: dict[str, str] | None = None, **variables: str) -> dict[str, str]:
    """Return an environment in which Python finds this clone's ptd from any folder."""
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return {**(dict(os.environ) if given is None else given), **paths, **variables}


def launch(*arguments: str | Path, folder: Path, given: dict[str, str] | None = None) -> Any:
    """Run the command to its end; ``given`` is the environment that it starts with."""
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(given),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
