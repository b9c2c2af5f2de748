"""A rank that makes no progress ends itself, with its stacks on disk, so that its launcher ends the others.

A rank that hangs makes the others wait in a collective: they make no progress either, and the same bound ends them.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import IO

from ptd.exit_codes import FATAL
from ptd.types import Reporter


class Watchdog:
    """While it is entered, ends the process (`FATAL`) when no `beat` comes for ``limit`` seconds; 0: never.

    The stacks of all threads are appended to ``stacks``; the file is there only if something is in it.
    """

    def __init__(self, limit: float, stacks: Path, rank: int) -> None:
        self.limit, self.stacks, self.rank = limit, stacks, rank
        self._tick = min(max(limit / 20, 0.05), 10.0)
        self._beats, self._where = 0, "start"
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._file: IO[str] | None = None

    def beat(self, where: str) -> None:
        """A sign of life, and what begins now."""
        self._where = where
        self._beats += 1

    def __enter__(self) -> Watchdog:
        if self.limit:
            # Opened now: when something hangs it may well be the disk.
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
                self.stacks.parent.rmdir()  # fails, as it should, while anything else is in it

    def _watch(self, file: IO[str]) -> None:
        seen, still, before = -1, 0.0, time.monotonic()
        while not self._closed.wait(self._tick):
            now = time.monotonic()
            # Time in which this thread stood too was no hang of the others: the job was suspended.
            passed, before = min(now - before, 2 * self._tick), now
            if self._beats != seen:
                seen, still = self._beats, 0.0
            else:
                still += passed
            if still >= self.limit:
                self._end(still, file)
            # For a main thread that hangs with the interpreter's lock, so that this one stands too: a thread in C that
            # does without. It exits with 1, which is FATAL.
            faulthandler.dump_traceback_later(2 * self.limit, exit=True, file=file)

    def _end(self, still: float, file: IO[str]) -> None:
        place = f"rank {self.rank} on {socket.gethostname()}, process {os.getpid()}"
        said = f"no progress for {still:.0f} s in {self._where}"
        with suppress(OSError):
            file.write(f"{datetime.now(timezone.utc).isoformat(timespec='seconds')}  {place}: {said}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            os.fsync(file.fileno())
        with suppress(OSError):  # not print: the thread that hangs may hold the stream's lock
            os.write(2, f"ptd: error: {place}: {said}; ending it. Stacks of all threads: {self.stacks}\n".encode())
        os._exit(FATAL)


class Watched(Reporter):
    """A reporter whose every ``advance`` is also a sign of life."""

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
