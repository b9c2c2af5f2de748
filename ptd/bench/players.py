"""Who takes the turns: a side in this process, or in one of its own."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from typing import Any

from ptd.types import UserError


class Player:
    """A side of a benchmark in a process of its own, blocked on a pipe unless it is asked for something.

    ``title``: how messages call it. ``environment``: variables of its process beside this one's.
    """

    def __init__(self, title: str, environment: dict[str, str] | None = None) -> None:
        self.title = title
        self._pipe, other = multiprocessing.Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ptd.bench.worker", str(other.fileno())],
            env={**os.environ, **(environment or {})},
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
        )
        other.close()

    def ask(self, name: str, *arguments: Any) -> Any:
        """The result of the side's method; raises its `UserError`, and one if the process is gone."""
        try:
            self._pipe.send((name, arguments))
            kind, result = self._pipe.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            why = "killed, as the system does when memory runs out" if code == -9 else f"exit code {code}"
            raise UserError(
                f"{self.title} ended while it was asked to {name} ({why}); lower train.per_device_train_batch_size or "
                "see what it printed"
            ) from error
        if kind == "refused":
            raise UserError(result)
        if kind == "failed":
            raise RuntimeError(f"{self.title} failed:\n{result}")
        return result

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Here:
    """A side in this process, where a launcher has started one process a rank already."""

    def __init__(self, side: Any) -> None:
        self._side = side

    def ask(self, name: str, *arguments: Any) -> Any:
        """The result of the side's method."""
        return getattr(self._side, name)(*arguments)

    def close(self) -> None:
        """Close the side."""
        self._side.close()
