"""Started by test_meeting.py as one rank of a run that goes wrong in the way that the argument names."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta

from ptd import cli
from ptd.distributed import rendezvous as meeting
from ptd.distributed.ranks import Ranks


def main(case: str) -> None:
    meeting.TRIAL = timedelta(seconds=6)
    rank = os.environ["RANK"]
    if case == "versions":
        meeting.versions = lambda: {"ptd": rank}
    meet = meeting._meet

    def announced(*arguments: object) -> None:
        meet(*arguments)
        if case == "stopped" and rank == "1":
            os.kill(os.getpid(), signal.SIGSTOP)

    meeting._meet = announced
    Ranks.start().stop()


if __name__ == "__main__":
    cli.app = lambda **options: main(sys.argv[1])
    cli.main()
