"""Call a side of a benchmark, in this process or in a separate one."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from typing import Any

from ptd.types import UserError


class Player:
    """A side of a benchmark in a separate process, which is blocked on a pipe until a method is called.

    ``title``: the name of the side in messages. ``environment``: variables of its process, added to this process's.
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
        """Return the result of the side's method ``name``; raise its `UserError`, or one if the process is gone."""
        try:
            self._pipe.send((name, arguments))
            kind, result = self._pipe.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            why = "killed, probably because memory ran out" if code == -9 else f"exit code {code}"
            raise UserError(
                f"{self.title} exited while it ran {name!r} ({why}); lower train.per_device_train_batch_size, or "
                "read what it printed"
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
    """A side in this process, for a launcher that has already started one process per rank."""

    def __init__(self, side: Any) -> None:
        self._side = side

    def ask(self, name: str, *arguments: Any) -> Any:
        """Return the result of the side's method ``name``."""
        return getattr(self._side, name)(*arguments)

    def close(self) -> None:
        """Close the side."""
        self._side.close()
