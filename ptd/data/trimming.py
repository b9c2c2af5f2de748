"""Remove entries of the cache of tokenised rows that were not used for the longest time, but none that is in use.

An entry is in use while a process of any machine maps its files. Every map holds a shared lock on its file
(`mapped_file`). Some network file systems hold locks on one machine only, so an entry also has a file ``used.HOST`` for
every machine that has used it, with the time of the last use: an entry that another machine has used stays for a month.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import secrets
import shutil
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "manifest.json"
ENTRY = re.compile(r"[0-9a-f]{32}")
"""The name of an entry. The folder may hold other things of the user's, which stay."""
USED = "used."
"""Beginning of the name of a file that says when a machine has last used an entry."""
MONTH = 30 * 86400.0
"""Seconds without use after which an entry that another machine has used may be removed."""
UNFINISHED = ".writing"
"""Ending of the name of a folder that is being written or removed. Its name begins with a dot."""


def mapped_file(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """Return a read-only map of a file, which holds a shared lock on the file as long as the map exists."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
            return np.empty(0, dtype=dtype)
        with contextlib.suppress(OSError):  # a file system without locks, where `trim` removes nothing
            fcntl.flock(file, fcntl.LOCK_SH)
        # The map has a duplicate of the file's descriptor, and with it the lock.
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype)


def mark_used(place: Path) -> None:
    """Record that this machine uses an entry now; without effect in a folder that it may not write to."""
    with contextlib.suppress(OSError):
        (place / f"{USED}{socket.gethostname()}").touch()


def trim(folder: Path, limit: float, keep: str) -> list[Path]:
    """Remove entries, those not used for the longest time first, until the rest has at most ``limit`` bytes.

    The entry ``keep`` stays, and so do entries in use, even if they have more than ``limit`` bytes. Return what was
    removed. Raises `OSError` if the folder cannot be listed.
    """
    places = [place for place in folder.iterdir() if ENTRY.fullmatch(place.name) and (place / MANIFEST).is_file()]
    entries = sorted(found for place in places if (found := _last_use_and_size(place)) is not None)
    total, removed = sum(size for _, size, _ in entries), []
    for _, size, place in entries:
        if total <= limit:
            break
        if place.name != keep and _remove_unused(place):
            total -= size
            removed.append(place)
    return removed


def discard(place: Path) -> bool:
    """Remove a folder that others may be opening: rename it first, so that nobody sees a part of it.

    Return whether this process was the first to do it.
    """
    aside = place.with_name(f".{place.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        place.rename(aside)
    except FileNotFoundError:
        return False
    shutil.rmtree(aside, ignore_errors=True)
    return True


def _remove_unused(place: Path) -> bool:
    """Remove an entry unless it is in use; return whether it was removed."""
    own, now = f"{USED}{socket.gethostname()}", time.time()
    try:
        if any(mark.name != own and now - mark.stat().st_mtime < MONTH for mark in place.glob(f"{USED}*")):
            return False
        with ExitStack() as stack:
            for path in place.glob("*.bin"):
                file = stack.enter_context(path.open("rb+"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return discard(place)
    except OSError:  # locked, without locks, or another process removes it
        return False


def _last_use_and_size(place: Path) -> tuple[float, int, Path] | None:
    try:
        files = {path: path.stat() for path in place.iterdir()}
        return (
            max(
                (each.st_mtime for path, each in files.items() if path.name.startswith(USED)),
                default=place.stat().st_mtime,
            ),
            sum(each.st_size for each in files.values()),
            place,
        )
    except OSError:  # another process removes it
        return None
