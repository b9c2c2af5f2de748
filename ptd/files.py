"""Resolve, read and write the paths and text files that users name. All of ptd uses these functions.

A text file is UTF-8; a leading byte order mark is not part of the text. Only ``\\n``, ``\\r\\n`` and ``\\r`` end a
line: U+2028, form feeds and similar characters belong to the text.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ptd.errors import UserError

OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order mark -> encoding. UTF-32 comes first, because one of its marks begins with one of UTF-16."""
LOOKED_AT = 4096
"""Number of bytes at the start of a file in which a null byte shows that the file is not UTF-8 text."""


def as_path(given: str | Path) -> Path:
    """Return the path with ``~`` and ``~user`` resolved; other relative paths start in the current folder.

    Raises `UserError` for an unknown home folder.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise UserError(f"{given}: there is no such home folder; write the full path") from error


def expand_home(given: str) -> str:
    """Return ``given`` with a leading ``~`` resolved, for settings that are a path or a hub name."""
    return str(as_path(given)) if given.startswith("~") else given


@contextmanager
def open_text(path: str | Path, saying: str, *, newline: str | None = None) -> Iterator[TextIO]:
    """Open the file for reading text; ``newline=""`` preserves line ends, otherwise all of them read as ``\\n``.

    Raises `UserError` if the file cannot be read or is not UTF-8, also later, while the caller reads. The message
    begins with ``saying`` ("--file: cannot read") and the path.
    """
    place = as_path(path)
    if "\0" in str(place):
        raise UserError(f"{saying} {str(place)!r}: the path contains a null character")
    try:
        with place.open("rb") as file:
            _check_beginning(file.peek(LOOKED_AT), f"{saying} {place}")  # a pipe cannot be opened a second time
            yield io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)
    except OSError as error:
        raise UserError(f"{saying} {place}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(f"{saying} {place}", str(error))) from error


def read_text(path: str | Path, saying: str) -> str:
    """Return a file's whole text, with every line end as ``\\n``; raises as `open_text` does."""
    with open_text(path, saying) as file:
        return file.read()


def decode_text(content: bytes, saying: str) -> str:
    """Decode bytes from another source by the rules for files; raises `UserError`."""
    _check_beginning(content[:LOOKED_AT], saying)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(saying, str(error))) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines_of(text: str) -> list[str]:
    """Return the lines of a text, without their line ends."""
    lines = re.split(r"\r\n|\n|\r", text)
    return lines[:-1] if lines[-1] == "" else lines


def check_writable(folder: str | Path, key: str) -> Path:
    """Return ``folder`` or its nearest existing ancestor; raise `UserError` if no file can be created there."""
    place = existing(folder)
    if not place.is_dir():
        raise UserError(f"{key}: {place} is a file; give a folder")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise UserError(
            f"{key}: cannot write to {place} ({error.strerror}); give a folder that you may write to, on a "
            "disk that has free space and is not mounted read-only"
        ) from error
    return place


def check_target(file: str | Path, key: str) -> Path:
    """Raise `UserError` unless ``file`` can be written, in a folder that may not exist yet; return its path."""
    place = as_path(file)
    if place.is_dir():
        raise UserError(f"{key}: {place} is a folder; give a file")
    check_writable(place.parent, key)
    if place.exists():
        try:
            place.open("ab").close()
        except OSError as error:
            raise UserError(f"{key}: cannot write {place} ({error.strerror}); give another file") from error
    return place


def write_text(file: str | Path, text: str, key: str) -> None:
    """Write a file atomically, and create its folder if necessary; raises a `UserError` that names ``key``."""
    place = as_path(file)
    temporary = place.with_name(f".{place.name}.tmp")
    try:
        if place.exists() and not place.is_file():  # a pipe or a device, which a rename would replace
            place.write_text(text, encoding="utf-8")
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(place)
    except OSError as error:
        raise UserError(f"{key}: cannot write {place} ({error.strerror or error}); give another file") from error


def existing(folder: str | Path) -> Path:
    """Return the nearest existing ancestor of the folder, or the folder itself if it exists; raises `UserError`."""
    place = as_path(folder).absolute()
    if "\0" in str(place):
        raise UserError(f"{str(place)!r:.200} cannot be a folder: it contains a null character")
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
    except OSError as error:  # for example a name that is too long
        raise UserError(f"{str(folder)[:200]} cannot be a folder: {error.strerror}") from error
    return place


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_beginning(beginning: bytes, saying: str) -> None:
    for mark, encoding in OTHER_ENCODINGS.items():
        if beginning.startswith(mark):
            raise UserError(_not_utf8(saying, f"but {encoding}"))
    if b"\0" in beginning:
        raise UserError(_not_utf8(saying, "it has null bytes"))


def _not_utf8(saying: str, reason: str) -> str:
    return f"{saying}: it is not UTF-8 text ({reason}); convert it, e.g. with iconv"
