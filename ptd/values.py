"""Plain values of rows and run files: whether one is missing, blank or the name of a label, and nested ones flattened.

A label's name is its text without surrounding white space. A whole number is the same label in every spelling: 1, 1.0,
"1" and "1.0".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.0+)?")
"""Matches text that is a whole number; a code such as 007 is not a number."""


def is_missing(value: Any) -> bool:
    """Return whether a cell has no value: null, or NaN, which tables of numbers use in place of null."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_blank(text: str) -> bool:
    """Return whether a text has no visible character: only white space, byte order marks and the like, or nothing."""
    return not (text[:1].isalnum() or any(character.isprintable() and not character.isspace() for character in text))


def name_of(value: Any) -> str | None:
    """Return a label's name; None for a value that is missing, blank, not finite, or neither text nor a number."""
    if isinstance(value, str):
        name = value.strip()
        if is_blank(name):
            return None
        return str(int(name.partition(".")[0])) if "." in name and WHOLE.fullmatch(name) else name
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int | float) else None


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys; an empty mapping stays a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        found |= flattened(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def memory_size(count: float) -> str:
    """Return a number of bytes as text with one decimal and a binary unit (KiB, MiB, GiB), for memory."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count:.0f} B"


def decimal_size(count: float) -> str:
    """Return a number of bytes as text with three digits and a unit (kB, MB, GB, TB), for files and traffic."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            value = count / 10**power
            return f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
    return f"{count:.0f} B"
