"""Started by test_rendezvous.py as one rank of a run that fails in the way that the argument names."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta

from ptd import cli
from ptd.distributed import rendezvous
from ptd.distributed.ranks import Ranks


def main(case: str) -> None:
    rendezvous.TRIAL = timedelta(seconds=6)
    rank = os.environ["RANK"]
    if case == "versions":
        rendezvous.versions = lambda: {"ptd": rank}
    meet = rendezvous._meet

    def announced(*arguments: object) -> None:
        meet(*arguments)
        if case == "stopped" and rank == "1":
            os.kill(os.getpid(), signal.SIGSTOP)

    rendezvous._meet = announced
    Ranks.start().stop()


if __name__ == "__main__":
    cli.app = lambda **options: main(sys.argv[1])
    cli.main()
