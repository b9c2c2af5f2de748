"""run.json while a run goes: that an attempt began, before anything large is loaded, and how it ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ptd.checkpoint.attempts import begun, ended
from ptd.checkpoint.files import claim, make_folders, write_atomically, writing
from ptd.checkpoint.run_folder import RunFolder
from ptd.errors import Diverged, Preempted, UserError


class Journal:
    """What run.json says of one attempt; it is rank 0 that writes. ``facts`` hold from its beginning to its end.

    What ends by a `UserError` or Ctrl-C before `training` leaves no trace: nothing was tried. What is killed there, or
    fails otherwise, counts as an attempt, unless a run is there that is to be replaced: that stays as it is until then.
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
        """Record that the attempt begins (rank 0). Raises `UserError` while another process trains in the folder."""
        with writing(self.folder.path):
            make_folders(self.folder.path)
        self._claim = claim(self.folder.path)
        if self._read() != self._before:
            raise UserError(f"output_dir: another process has just ended in {self.folder.path}; give the command again")
        if not self.folder.replaces:
            self._begun = True
            self._write("running")

    def training(self, **facts: Any) -> None:
        """Loaded; what the folder holds from here on is this run's (rank 0). ``facts`` are known now."""
        self._begun = self._trains = True
        self.content |= facts
        self._write("running")

    def tell(self, **facts: Any) -> None:
        """Record what has happened meanwhile; all ranks may call this."""
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
        """Around the attempt: records how it broke off."""
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
            with suppress(OSError, UserError):  # a full disk, for one, is what may have ended it
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
