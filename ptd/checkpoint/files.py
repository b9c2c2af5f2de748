"""Write files so that a reader sees either the old or the new content, never a part of it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ptd.files import sync
from ptd.types import UserError

PATIENCE = 10.0
"""Seconds to wait for a process that is ending to release its folder."""


def make_folders(path: Path) -> None:
    """Create a folder and its missing parents, and force their names to disk."""
    if not path.is_dir():
        make_folders(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise `UserError` that says what to do if the file system refuses a write to an output folder in this context."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        place = getattr(error, "filename", None) or path
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"output_dir: cannot write {place} ({reason}); make sure that the folder has free space and is writable; "
            "the same command then continues from the last checkpoint"
        ) from error


def claim(folder: Path) -> int | None:
    """Lock a folder for this process until the returned descriptor is closed or the process ends.

    Returns None if the file system does not support locks. Raises `UserError` if another process still holds the lock
    after `PATIENCE` seconds; a process that is about to end releases it by then.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    limit = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError as error:
            if time.monotonic() > limit:
                os.close(descriptor)
                raise UserError(
                    f"output_dir: another process is training into {folder}; wait until it has ended, or give another "
                    "folder"
                ) from error
            time.sleep(0.2)
        except OSError:
            os.close(descriptor)
            return None


def write_atomically(path: Path, content: str) -> None:
    """Write to a temporary file next to ``path``, force it to disk, then rename it to ``path``."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomically(path, as_json(value))


def as_json(value: Any) -> str:
    """Return the text that `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
