"""Track a run with Weights & Biases, which reads WANDB_API_KEY, WANDB_MODE, WANDB_ENTITY and WANDB_PROJECT.

The default project is ``ptd``. A run that continues keeps its id. The server does not accept steps that it already has,
which is right: a continued run repeats them bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import wandb

from ptd.trackers import Status, Tracked


class Wandb:
    """One W&B run; its files are stored in ``output_dir/wandb``, or in WANDB_DIR."""

    def __init__(self, run: Tracked) -> None:
        quiet = wandb.Settings(silent=True, console="off")  # silent: it does not ask for a key either
        wandb.setup(settings=quiet)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ptd"),
            name=run.name,
            id=run.id,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            config=run.config,
            settings=quiet,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, status: Status) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


def start(run: Tracked) -> Wandb:
    return Wandb(run)
