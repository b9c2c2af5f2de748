"""Run ``ptd train`` and kill it without warning; test_resume.py runs this under torchrun.

    torchrun … worker_crash.py STEP train RUN.yaml

Rank 0 is killed right after it recorded STEP, with the next record half written. No checkpoint is being written at
that moment: which checkpoints exist must not depend on the speed of the disk.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from ptd.checkpoint import Saver
from ptd.cli import main
from ptd.runs.metrics_log import Records

last_step = int(sys.argv.pop(1))
write, save = Records.write, Saver.save


def write_and_die(self: Records, record: dict[str, Any]) -> None:
    write(self, record)
    if record["step"] >= last_step:
        with self.path.open("a", encoding="utf-8") as file:
            file.write('{"step": 8, "lo')
        os.kill(os.getpid(), signal.SIGKILL)


def save_and_wait(self: Saver, *given: Any, **named: Any) -> None:
    save(self, *given, **named)
    self.wait()


Records.write, Saver.save = write_and_die, save_and_wait
main()
