"""Store tokenised rows in a folder, and map them into memory: one entry per digest of what determines the result.

An entry is the folder ``KEY`` with one file per array (``tokens.bin``, ``source.offsets.bin``, …) and ``manifest.json``
with the length and the SHA-256 of every file. An entry is written into a temporary folder, forced to disk and renamed,
so that a reader sees all of an entry or nothing. Two processes may write the same entry: the first rename wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ptd.data.collecting import DTYPES
from ptd.data.trimming import ENTRY, MANIFEST, MONTH, UNFINISHED, discard, mapped_file, mark_used, trim
from ptd.files import as_path, sync, write_text
from ptd.types import DataReport, Examples, Summary, UserError

VERSION = 1
"""Version of the form of an entry. An entry with another version counts as damaged and is written again."""
LOCK = "lock"
LEARNED = ".learned.json"
"""Ending of the name of a file that says what a task has learned from rows."""
FRESH = 600.0
"""Seconds without a change after which a temporary folder may be a leftover. Its lock alone does not say so: some
network file systems hold locks on one machine only."""
BLOCK_BYTES = 2**24
"""Bytes of a file that are read or written at a time."""


class CacheError(Exception):
    """The cache cannot be used; the message is the reason, for a sentence in brackets."""


class Damaged(Exception):
    """An entry is not what its manifest says, or has no manifest; the message is the reason."""


def default_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/ptd/rows`` or ``~/.cache/ptd/rows``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return as_path(base) / "ptd" / "rows"


@contextlib.contextmanager
def _failing(place: Path) -> Iterator[None]:
    """Raise `CacheError` if the file system refuses what this context does with ``place``."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"{error.filename or place}: {error.strerror or error}") from error


class RowsCache:
    """The entries in a folder, which does not have to exist yet. ``limit``: bytes that they may have (`trim`)."""

    def __init__(self, folder: Path, limit: float = math.inf) -> None:
        self.folder, self.limit = folder, limit

    def read(self, key: str, *, verify: bool) -> Examples | None:
        """Return the entry's examples as read-only maps of its files; None if there is no such entry.

        ``verify``: also compare the content of every file with its SHA-256, which reads all of it; the sizes are always
        compared. Raises `Damaged`, or `CacheError` if the entry cannot be read.
        """
        place = self.folder / key
        manifest = self.manifest(key)
        if manifest is None:
            return None
        mark_used(place)
        with _failing(place):
            arrays = {
                name: _mapped(place / f"{name}.bin", facts, verify=verify) for name, facts in manifest["arrays"].items()
            }
            if not (place / MANIFEST).exists():  # removed before its files were locked (`ptd.data.trimming`)
                return None
        return _assembled(manifest["examples"], arrays, "")

    def manifest(self, key: str) -> dict[str, Any] | None:
        """Return the entry's manifest, or None if there is no such entry; raises as `read` does."""
        place = self.folder / key
        with _failing(place):
            if not place.is_dir():
                return None
            try:
                manifest: dict[str, Any] = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
                whole = manifest.pop("sha256") == _digest_of(manifest)
            except (FileNotFoundError, ValueError, KeyError, AttributeError) as error:
                raise Damaged(f"{place / MANIFEST} is missing or not a manifest") from error
        if not whole or (manifest["version"], manifest["key"]) != (VERSION, key):
            raise Damaged(f"{place / MANIFEST} was changed, or belongs to another entry or version")
        return manifest

    def blocks(self, key: str, name: str) -> Iterator[np.ndarray]:
        """Yield the bytes of an array of an entry, uint8, up to `BLOCK_BYTES` at a time. Raises `CacheError`."""
        path = self.folder / key / f"{name}.bin"
        with _failing(path), path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield np.frombuffer(bytearray(block), dtype=np.uint8)

    def remove(self, key: str) -> None:
        """Remove an entry. Processes that have mapped it keep their maps. Raises `CacheError`."""
        with _failing(self.folder):
            discard(self.folder / key)

    def trim(self, keep: str) -> None:
        """Remove what is beyond the limit, except the entry ``keep`` and others in use."""
        with contextlib.suppress(OSError):  # a folder that cannot be listed
            trim(self.folder, self.limit, keep)
            for old in self.folder.glob(f"*{LEARNED}"):
                name = old.name.removesuffix(LEARNED)
                if ENTRY.fullmatch(name) and time.time() - old.stat().st_mtime > MONTH:
                    old.unlink()

    def learned(self, key: str, learn: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what a task learns from rows: what is stored under ``key``, or else the result of ``learn``.

        The result, plain values, is stored if the folder can be written.
        """
        path = self.folder / f"{key}{LEARNED}"
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if stored["sha256"] == _digest_of([key, stored["learned"]]):
                with contextlib.suppress(OSError):  # of another user, or on a read-only disk
                    path.touch()
                learned: dict[str, Any] = stored["learned"]
                return learned
        except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
            pass
        found = learn()
        with contextlib.suppress(UserError):
            write_text(path, json.dumps({"sha256": _digest_of([key, found]), "learned": found}), "data.cache")
        return found

    def write(self, key: str) -> EntryDraft:
        """Begin an entry; raises `CacheError`. Leftovers of writers that no longer run are removed first."""
        with _failing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.glob(f".*{UNFINISHED}"):
                if _abandoned(old):
                    shutil.rmtree(old, ignore_errors=True)
            place = self.folder / f".{key}.{secrets.token_hex(8)}{UNFINISHED}"
            place.mkdir()
            return EntryDraft(self.folder / key, place)


class EntryDraft:
    """An entry that is being written. As a context manager it removes its files, unless `publish` renamed them.

    It is the `ptd.data.collecting.Columns` of its arrays. Every method raises `CacheError` if the file system refuses a
    write, for example because the disk is full.
    """

    def __init__(self, final: Path, place: Path) -> None:
        self.final, self.place = final, place
        self._columns: dict[str, InFile] = {}
        self._lock = (place / LOCK).open("wb")
        with contextlib.suppress(OSError):  # a file system without locks: leftovers then stay
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __call__(self, name: str, dtype: type[np.generic]) -> InFile:
        self._columns[name] = InFile(self.place / f"{name}.bin", dtype)
        return self._columns[name]

    def __enter__(self) -> EntryDraft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for column in self._columns.values():
            column.abandon()
        shutil.rmtree(self.place, ignore_errors=True)
        self._lock.close()

    def publish(self, examples: Examples) -> None:
        """Write the manifest of ``examples``, whose arrays are this draft's columns, and rename the folder."""
        described = _described(examples, "", self)
        self._publish({"version": VERSION, "key": self.final.name, "examples": described, "arrays": self._arrays()})

    def receive(self, manifest: dict[str, Any], blocks: Iterable[tuple[str, np.ndarray]]) -> None:
        """Write an entry of another folder, of which ``blocks`` has the arrays' names and bytes, and publish it."""
        for name, facts in manifest["arrays"].items():
            self(name, np.dtype(facts["dtype"]).type)
        for name, block in blocks:
            column = self._columns[name]
            column.append(block.view(column.dtype))
        for column in self._columns.values():
            column.array()
        if self._arrays() != manifest["arrays"]:
            raise CacheError(f"{self.place} has received other content than was sent")
        self._publish(manifest)

    def _arrays(self) -> dict[str, Any]:
        with _failing(self.place):
            return {name: column.described() for name, column in self._columns.items()}

    def _publish(self, manifest: dict[str, Any]) -> None:
        with _failing(self.place):
            with (self.place / MANIFEST).open("w", encoding="utf-8") as file:
                json.dump({"sha256": _digest_of(manifest), **manifest}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            sync(self.place)
            try:
                self.place.rename(self.final)
            except OSError:
                if not self.final.is_dir():
                    raise
                return  # another process was first
            sync(self.final.parent)


class InFile:
    """A column in a file. Raises `CacheError` if the file system refuses a write."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        with _failing(path):
            self._file = path.open("wb", buffering=2**20)

    def append(self, values: np.ndarray) -> None:
        with _failing(self.path):
            self._file.write(values.astype(self.dtype, copy=False).tobytes())

    def array(self) -> np.ndarray:
        """Force the file to disk and return a read-only map of it."""
        with _failing(self.path):
            if not self._file.closed:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            return mapped_file(self.path, self.dtype)

    def described(self) -> dict[str, Any]:
        """Return what the manifest says of the file, after `array`."""
        length = self.path.stat().st_size // self.dtype.itemsize
        return {"dtype": self.dtype.name, "length": length, "sha256": _digest(self.path)}

    def abandon(self) -> None:
        """Close the file, whose content no longer matters."""
        with contextlib.suppress(OSError):  # what is still in its buffer may not fit the disk either
            self._file.close()


def _mapped(path: Path, facts: dict[str, Any], *, verify: bool) -> np.ndarray:
    """Map a file after comparing it with the manifest's ``facts`` on it; raises `Damaged`."""
    dtype = np.dtype(facts["dtype"])
    wanted = facts["length"] * dtype.itemsize
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing") from error
    if size != wanted:
        raise Damaged(f"{path} has {size:,} bytes instead of {wanted:,}")
    if verify and _digest(path) != facts["sha256"]:
        raise Damaged(f"{path} has other content than was written")
    return mapped_file(path, dtype)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _described(examples: Examples, prefix: str, draft: EntryDraft) -> dict[str, Any]:
    """Return the manifest's description of one side; adds the column of its label counts to ``draft``."""
    summary = examples.summary
    counts = draft(f"{prefix}supervised", DTYPES["supervised"])
    counts.append(summary.supervised)
    counts.array()
    source = None if examples.source is None else _described(examples.source, f"{prefix}source.", draft)
    return {
        "report": dataclasses.asdict(examples.report),
        "group": examples.group,
        "aside": None if examples.aside is None else list(examples.aside),
        "highest_token": summary.highest_token,
        "highest_label": summary.highest_label,
        "digest": summary.digest,
        "source": source,
    }


def _assembled(described: dict[str, Any], arrays: dict[str, np.ndarray], prefix: str) -> Examples:
    report: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in described["report"].items()
    }
    numbers = {name: described[name] for name in ("highest_token", "highest_label", "digest")}
    aside, source = described["aside"], described["source"]
    return Examples(
        tokens=arrays[f"{prefix}tokens"],
        labels=arrays[f"{prefix}labels"],
        offsets=arrays[f"{prefix}offsets"],
        report=DataReport(**report),
        group=described["group"],
        token_types=arrays.get(f"{prefix}token_types"),
        source=None if source is None else _assembled(source, arrays, f"{prefix}source."),
        aside=None if aside is None else {name: arrays[f"{prefix}aside.{name}"] for name in aside},
        known=Summary(arrays[f"{prefix}supervised"], **numbers),
    )


def _abandoned(place: Path) -> bool:
    """Return whether the writer of a temporary folder has ended without removing it."""
    try:
        newest = max(path.stat().st_mtime for path in (place, *place.iterdir()))
        if time.time() - newest < FRESH:
            return False
        lock = place / LOCK
        if lock.exists():
            with lock.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:  # locked, without locks, or already removed
        return False
