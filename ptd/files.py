"""What people name on a disk: paths, texts to read, places to write to. One way each, for all of ptd.

A text is UTF-8; a byte order mark in front is no part of it. Lines end in ``\\n``, ``\\r\\n`` or ``\\r`` and in nothing
else: U+2028, form feeds and the like stand inside texts.
"""

from __future__ import annotations

import codecs
import io
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
"""Marks in front of a file; those of UTF-32 begin as those of UTF-16 do."""
LOOKED_AT = 4096
"""Bytes of a file's beginning in which a null byte gives away that it is no UTF-8 text."""


def as_path(given: str | Path) -> Path:
    """The path that a person means: ``~`` and ``~user`` are home folders; the rest starts in the current folder.

    Raises `UserError` for a home folder that is not known.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise UserError(f"{given}: there is no such home folder; write the path out") from error


def local(given: str) -> str:
    """``given`` with ``~`` resolved where it has one: for settings that are a path or a name on the hub."""
    return str(as_path(given)) if given.startswith("~") else given


@contextmanager
def open_text(path: str | Path, saying: str, *, newline: str | None = None) -> Iterator[TextIO]:
    """The file's text; ``newline=""`` leaves line ends as they are, otherwise all of them read as ``\\n``.

    Raises `UserError`, which begins with ``saying`` ("--file: cannot read") and the path, if the file cannot be read or
    is no UTF-8, also while the caller reads.
    """
    place = as_path(path)
    if "\0" in str(place):
        raise UserError(f"{saying} {str(place)!r}: it has a null character, which no path has")
    try:
        with place.open("rb") as file:
            _check_beginning(file.peek(LOOKED_AT), f"{saying} {place}")  # opened once: it may be a pipe
            yield io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)
    except OSError as error:
        raise UserError(f"{saying} {place}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(f"{saying} {place}", str(error))) from error


def read_text(path: str | Path, saying: str) -> str:
    """All of a file's text, every line end as ``\\n``; raises as `open_text` does."""
    with open_text(path, saying) as file:
        return file.read()


def decode(content: bytes, saying: str) -> str:
    """Bytes that come from elsewhere than a file, read as a file's; raises `UserError`."""
    _check_beginning(content[:LOOKED_AT], saying)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(saying, str(error))) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines_of(text: str) -> list[str]:
    """The lines of a text, without their ends."""
    lines = re.split(r"\r\n|\n|\r", text)
    return lines[:-1] if lines[-1] == "" else lines


def check_writable(folder: str | Path, key: str) -> Path:
    """Raise `UserError` unless files can be made in ``folder``, or above it if it is yet to be made; returns where."""
    place = existing(folder)
    if not place.is_dir():
        raise UserError(f"{key}: {place} is a file; give a folder")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise UserError(
            f"{key}: cannot write to {place} ({error.strerror}); give a folder that you may write to, on a "
            "disk with space that is not mounted read-only"
        ) from error
    return place


def check_target(file: str | Path, key: str) -> Path:
    """Raise `UserError` unless ``file`` can be written, in a folder that may be yet to be made; returns its path."""
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
    """Write a file whole or not at all, in a folder that is made if need be; raises `UserError` that names ``key``."""
    place = as_path(file)
    temporary = place.with_name(f".{place.name}.tmp")
    try:
        if place.exists() and not place.is_file():  # a pipe or a device, which nothing may be renamed to
            place.write_text(text, encoding="utf-8")
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(place)
    except OSError as error:
        raise UserError(f"{key}: cannot write {place} ({error.strerror or error}); give another file") from error


def existing(folder: str | Path) -> Path:
    """The folder, or what there is of it as long as it is yet to be made."""
    place = as_path(folder).absolute()
    if "\0" in str(place):
        raise UserError(f"{str(place)!r:.200} cannot be a folder: it has a null character")
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
    except OSError as error:  # a name too long, for one
        raise UserError(f"{str(folder)[:200]} cannot be a folder: {error.strerror}") from error
    return place


def _check_beginning(beginning: bytes, saying: str) -> None:
    for mark, encoding in OTHER_ENCODINGS.items():
        if beginning.startswith(mark):
            raise UserError(_not_utf8(saying, f"but {encoding}"))
    if b"\0" in beginning:
        raise UserError(_not_utf8(saying, "it has null bytes"))


def _not_utf8(saying: str, reason: str) -> str:
    return f"{saying}: it is not UTF-8 text ({reason}); convert it, e.g. with iconv"
