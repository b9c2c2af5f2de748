"""``ptd train`` that dies without a word: run under torchrun by test_resume.py.

    torchrun … worker_crash.py STEP train RUN.yaml

Rank 0 is killed right after it recorded STEP, with the next record half written. No checkpoint is in flight then:
which ones there are must not depend on how fast the disk is.
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
