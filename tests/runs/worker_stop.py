"""Run on ranks by test_resume_optimizers.py: train, and stop on request after a step as a signal would.

torchrun … worker_stop.py STEP RUN.yaml [key=value …]
"""

from __future__ import annotations

import sys
from contextlib import suppress

from ptd.commands.train import train
from ptd.config import load_config
from ptd.engine.preemption import StopRequest
from ptd.errors import Preempted


class AfterSteps(StopRequest):
    """A request that is wanted from step ``last`` on: the run asks once before the first step and once per step."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.left = last

    @property
    def wanted(self) -> bool:
        self.left -= 1
        return self.left < 0


with suppress(Preempted):
    train(load_config(sys.argv[2], sys.argv[3:]), request=AfterSteps(int(sys.argv[1])))
    raise SystemExit("the run was not stopped")
