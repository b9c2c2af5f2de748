"""What a value in a row or a run file counts as: missing, blank, or the name of a label. One rule for all of ptd.

A label's name is text without the white space around it, and a whole number is one label however it is written: 1, 1.0,
"1" and "1.0".
"""

from __future__ import annotations

import math
import re
from typing import Any

WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.0+)?")
"""Text that is a whole number; codes such as 007 are none."""


def is_missing(value: Any) -> bool:
    """Whether a cell holds no value: null, or the NaN that tables of numbers have in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_blank(text: str) -> bool:
    """Whether there is nothing to be seen: no characters, or only white space, byte order marks and the like."""
    return not (text[:1].isalnum() or any(character.isprintable() and not character.isspace() for character in text))


def name_of(value: Any) -> str | None:
    """What a label is called; None for what is no label: missing, blank, not finite, or neither text nor a number."""
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
