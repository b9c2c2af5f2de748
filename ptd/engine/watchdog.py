"""Terminate a rank that makes no progress, after writing its stacks to disk, so that its launcher stops the others.

A rank that hangs makes the others wait in a collective. They make no progress either, so the same limit stops them.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO

from ptd.errors import FATAL
from ptd.types import Reporter


class Watchdog:
    """A context manager that exits the process with `FATAL` if `beat` is not called for ``limit`` seconds; 0: never.

    It appends the stacks of all threads to the file ``stacks``, and removes the file on leaving if it is empty.
    """

    def __init__(self, limit: float, stacks: Path, rank: int) -> None:
        self.limit, self.stacks, self.rank = limit, stacks, rank
        self._tick = min(max(limit / 20, 0.05), 10.0)
        self._beats, self._where = 0, "start"
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._file: IO[str] | None = None

    def beat(self, where: str) -> None:
        """Report progress; ``where`` names the work that begins now."""
        self._where = where
        self._beats += 1

    def __enter__(self) -> Watchdog:
        if self.limit:
            # Open the file now: the disk may be what hangs later.
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.stacks.open("a", encoding="utf-8")
            self._thread = threading.Thread(target=self._watch, args=(self._file,), name="ptd-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None or self._file is None:
            return
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        with suppress(OSError):
            if self.stacks.stat().st_size == 0:
                self.stacks.unlink()
                self.stacks.parent.rmdir()  # fails, as intended, if the folder holds anything else

    def _watch(self, file: IO[str]) -> None:
        seen, still, before = -1, 0.0, time.monotonic()
        while not self._closed.wait(self._tick):
            now = time.monotonic()
            # Do not count time in which this thread did not run either: the job was suspended then.
            passed, before = min(now - before, 2 * self._tick), now
            if self._beats != seen:
                seen, still = self._beats, 0.0
            else:
                still += passed
            if still >= self.limit:
                self._end(still, file)
            # If the main thread hangs while it holds the GIL, this thread stops too. The timer of faulthandler is a C
            # thread that does not need the GIL; it exits with 1, which is FATAL.
            faulthandler.dump_traceback_later(2 * self.limit, exit=True, file=file)

    def _end(self, still: float, file: IO[str]) -> None:
        place = f"rank {self.rank} on {socket.gethostname()}, process {os.getpid()}"
        said = f"no progress for {still:.0f} s in {self._where}"
        with suppress(OSError):
            file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')}  {place}: {said}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            os.fsync(file.fileno())
        with suppress(OSError):  # not print: the hanging thread may hold the lock of the stream
            os.write(
                2,
                f"ptd: error: {place}: {said}; stopping this process. Stacks of all threads: {self.stacks}\n".encode(),
            )
        os._exit(FATAL)


class Watched(Reporter):
    """A reporter whose ``advance`` also reports progress to the watchdog."""

    def __init__(self, reporter: Reporter, watchdog: Watchdog) -> None:
        self._reporter, self._watchdog = reporter, watchdog

    def note(self, text: str) -> None:
        self._reporter.note(text)

    def start(self, task: str, total: int, done: int = 0) -> None:
        self._reporter.start(task, total, done)

    def advance(self, task: str, done: int, line: str | None = None) -> None:
        self._watchdog.beat(f"{task}, after {done}")
        self._reporter.advance(task, done, line)

    def finish(self, task: str) -> None:
        self._reporter.finish(task)
