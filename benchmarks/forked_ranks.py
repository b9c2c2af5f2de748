"""Fork ranks from a process that has loaded torch: like a launcher, without its ten seconds per start.

Each rank is a separate process with the environment that a launcher sets, its own process group and its own files. When
a rank fails, the others get a moment to exit by themselves (they may be writing the same error), then SIGTERM, then
SIGKILL. The process that forks must not have used autograd or started threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ptd.distributed.ranks import Ranks

PR_SET_PDEATHSIG = 1


@dataclass
class Job:
    """Running ranks: the process of rank r is ``pids[r]``; its output is in ``logs / "r.log"``."""

    pids: list[int]
    logs: Path
    codes: dict[int, int] = field(default_factory=dict)
    """Exit codes of the ranks that have exited, by rank; −9 for SIGKILL."""

    def poll(self) -> bool:
        """Return whether all ranks have exited."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, timeout: float = 300.0, grace: float = 5.0) -> list[int]:
        """Wait for all ranks and return their exit codes by rank.

        After ``timeout`` seconds, or once a rank has failed, the others are stopped: they have ``grace`` seconds to
        exit by themselves, and as many again after SIGTERM, before SIGKILL.
        """
        deadline = time.monotonic() + timeout
        while not self.poll() and time.monotonic() < deadline and not any(self.codes.values()):
            time.sleep(0.02)
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number is not None:
                self.kill(number)
            deadline = time.monotonic() + grace
            while not self.poll() and (time.monotonic() < deadline or number is signal.SIGKILL):
                time.sleep(0.02)
        return [self.codes[rank] for rank in range(len(self.pids))]

    def kill(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all ranks that still run."""
        for place, pid in enumerate(self.pids):
            if place not in self.codes and rank in (None, place):
                os.kill(pid, number)

    def log(self, rank: int) -> str:
        return (self.logs / f"{rank}.log").read_text(encoding="utf-8")


def start(ranks: int, work: Callable[[int], None], logs: Path) -> Job:
    """Fork ``ranks`` processes that call ``work(rank)``."""
    logs.mkdir(parents=True, exist_ok=True)
    port = str(Ranks.free_port())
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _run(rank, ranks, port, work, logs)
        pids.append(pid)
    return Job(pids, logs)


def _run(rank: int, ranks: int, port: str, work: Callable[[int], None], logs: Path) -> None:
    """Run ``work(rank)`` in the forked process; never returns."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives its parent process
        output = os.open(logs / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        work(rank)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
