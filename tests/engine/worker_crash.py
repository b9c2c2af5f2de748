"""``ptd train`` that dies without a word: run under torchrun by test_resume.py.

    torchrun … worker_crash.py STEP train RUN.yaml

Rank 0 is killed right after it recorded STEP, with the next record half written.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from ptd.cli import main
from ptd.engine.records import Records

last_step = int(sys.argv.pop(1))
write = Records.write


def write_and_die(self: Records, record: dict[str, Any]) -> None:
    write(self, record)
    if record["step"] >= last_step:
        with self.path.open("a", encoding="utf-8") as file:
            file.write('{"step": 8, "lo')
        os.kill(os.getpid(), signal.SIGKILL)


Records.write = write_and_die
main()
