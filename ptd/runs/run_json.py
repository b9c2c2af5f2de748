"""Write run.json during a run: that an attempt began, before anything large is loaded, and how it ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ptd.checkpoint.files import claim, make_folders, write_atomically, writing
from ptd.errors import Diverged, Preempted, UserError
from ptd.runs.folder import RunFolder
from ptd.runs.restarts import begun, ended


class Journal:
    """Writes what run.json says of one attempt; only rank 0 writes. ``facts``: entries that hold for the whole attempt.

    An attempt that stops with a `UserError` or Ctrl-C before `training` leaves no trace, because nothing was tried. One
    that is killed before `training`, or fails there in another way, counts as an attempt. The exception is a folder
    whose run is to be replaced: its run.json does not change before `training`.
    """

    def __init__(self, folder: RunFolder, facts: dict[str, Any], *, is_main: bool) -> None:
        self.folder, self.is_main = folder, is_main
        attempts = begun(list(folder.attempts), folder.step)
        self.content = {**facts, "attempts": attempts, "started": attempts[0]["started"]}
        self._file = folder.path / "run.json"
        self._before = self._read()
        self._missing = [place for place in (folder.path, *folder.path.parents) if not place.exists()]
        self._begun = self._trains = False
        self._claim: int | None = None

    def begin(self) -> None:
        """Record that the attempt begins (rank 0). Raises `UserError` if another process trains in the folder."""
        with writing(self.folder.path):
            make_folders(self.folder.path)
        self._claim = claim(self.folder.path)
        if self._read() != self._before:
            raise UserError(f"output_dir: another process has just ended in {self.folder.path}; run the command again")
        if not self.folder.replaces:
            self._begun = True
            self._write("running")

    def training(self, **facts: Any) -> None:
        """Record that training begins (rank 0); from now on the folder is this run's. ``facts`` are known only now."""
        self._begun = self._trains = True
        self.content |= facts
        self._write("running")

    def tell(self, **facts: Any) -> None:
        """Record ``facts`` during the run; all ranks may call this."""
        if self.is_main:
            self.content |= facts
            self._write("running")

    def end(self, status: str, **facts: Any) -> None:
        """Record how the attempt ended; all ranks may call this."""
        if self.is_main:
            self.content["attempts"] = ended(self.content["attempts"], status, **facts)
            self._write(status)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Run the attempt in this context, and record how it fails or is interrupted."""
        try:
            yield
        except (Preempted, Diverged):
            raise
        except (UserError, KeyboardInterrupt) as stop:
            if not self._trains:
                self._undo()
            elif isinstance(stop, UserError):
                self._failed(stop)
            else:
                self.end("interrupted")
            raise
        except Exception as error:
            self._failed(error)
            raise
        finally:
            if self._claim is not None:
                os.close(self._claim)

    def _read(self) -> str | None:
        return self._file.read_text(encoding="utf-8") if self._file.is_file() else None

    def _failed(self, error: Exception) -> None:
        if self._begun:
            with suppress(OSError, UserError):  # the failure may be a full disk
                self.end("failed", error=f"{type(error).__name__}: {error}"[:500])

    def _undo(self) -> None:
        if not self.is_main:
            return
        with suppress(OSError):
            if self._begun and self._before is not None:
                write_atomically(self._file, self._before)
                return
            if self._begun:
                self._file.unlink()
            for place in self._missing:
                place.rmdir()

    def _write(self, status: str) -> None:
        self.folder.write({"status": status, **self.content})
