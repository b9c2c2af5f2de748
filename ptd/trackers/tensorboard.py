"""Write TensorBoard's event files to ``output_dir/tensorboard``.

Each record is written immediately. TensorBoard's own writer uses a thread, which prints a traceback when the disk is
full and loses the records that it still holds.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from ptd.trackers import Status, Tracked

_count = itertools.count()


class _Whole(io.FileIO):
    """A file that writes all bytes or raises; a plain file may write only the part that fits on the disk."""

    def write(self, data: Any) -> int:
        written = super().write(data)
        if written != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
        return written


class TensorBoard:
    """One event file for this start of the run."""

    def __init__(self, run: Tracked) -> None:
        folder = run.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        own = f"{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_count)}"
        self._writer = RecordWriter(_Whole(folder / f"events.out.tfevents.{own}", "w"))
        self._add(Event(file_version="brain.Event:2"))
        if run.after_step or run.again:  # hides later records, which will be written again
            self._add(Event(step=run.after_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(step=step, summary=Summary(value=scalars)))

    def close(self, status: Status) -> None:
        self._writer.close()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        try:
            self._writer.write(event.SerializeToString())
        except OSError:
            self._writer.close()
            raise


def start(run: Tracked) -> TensorBoard:
    return TensorBoard(run)
