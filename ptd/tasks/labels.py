"""Labels of rows: what they are called, what can be learned to be a set of labels, and which one a row has."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ptd.types import UserError
from ptd.values import WHOLE, name_of

Kind = Literal["number", "truth value", "text"]
FEW = 20
"""Whole numbers with gaps, and labels that hardly occur twice, may be labels up to so many."""

_NUMBER = re.compile(r"[+-]?([0-9]+[.,]?[0-9]*|[.,][0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
_MISSING = {"nan", "<na>", "nat"}
"""What pandas writes for a missing value that it turns into text."""
_REGRESSION = "predicting a number (regression) is no task of ptd: turn the numbers into classes"


def name_at(value: Any, names: tuple[str, ...], place: str) -> str:
    """The name of the label that stands at ``place`` ("row 3 of train.csv: 'label'").

    ``names``: what whole numbers stand for; empty: for themselves. Raises `UserError` for what is no label.
    """
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if names and isinstance(number, int) and not isinstance(number, bool):
        if 0 <= number < len(names):
            return names[number]
        hidden = " (−1 mostly stands for a label that is not given away)" if number == -1 else ""
        raise UserError(
            f"{place} is {number}{hidden}, but numbers from 0 to {len(names) - 1} stand for the labels {some(names)}; "
            "correct or remove the row"
        )
    name = name_of(value)
    if name is None:
        raise UserError(
            f"{place} has to be a label (text or a number), but is {type(value).__name__} ({repr(value)[:60]})"
        )
    return name


def names_of(feature: Any, column: str, what: str) -> tuple[str, ...]:
    """The names that a data set itself gives to the numbers of a ``ClassLabel``; empty: it gives none.

    Raises `UserError` for names that are blank or the same.
    """
    given = getattr(feature, "names", None) or ()
    names = tuple(name_of(name) or "" for name in given)
    if "" in names or len(set(names)) < len(names):
        raise UserError(
            f"task.labels: {column!r} in {what} names its labels {some(map(repr, given))}, of which one is blank or "
            "there twice; give the labels names of their own"
        )
    return names


class Seen:
    """Labels of the rows that the names are learned from: how often each occurs, and where each kind first stood."""

    def __init__(self, column: str, what: str) -> None:
        self.column, self.what = column, what
        self.counts: Counter[str] = Counter()
        self._places: dict[Kind, tuple[int, Any]] = {}

    def add(self, name: str, value: Any, row: int) -> None:
        """Count the label ``name``, which is ``value`` in the data."""
        self.counts[name] += 1
        kind: Kind = (
            "truth value" if isinstance(value, bool) else "number" if isinstance(value, int | float) else "text"
        )
        self._places.setdefault(kind, (row, value))

    def names(self) -> tuple[str, ...]:
        """The names in order: whole numbers by their value, then the others.

        Raises `UserError` for what is likely no set of labels: fractions, whole numbers with gaps or nearly as many
        labels as rows, numbers among words, names that differ in case only, and missing values that became text. Who
        lists the labels in ``task.labels`` is believed.
        """
        names = sorted(self.counts, key=_order)
        doubt = self._doubt(names)
        if doubt is not None:
            raise UserError(
                f"task.labels: {self.column!r} in {self.what} {doubt}. If these are the labels all the same, list them "
                "in task.labels"
            )
        return tuple(names)

    def _doubt(self, names: list[str]) -> str | None:
        numeric = [name for name in names if _NUMBER.fullmatch(name)]
        fractions = [name for name in numeric if not float(name.replace(",", ".")).is_integer()]
        if fractions:
            return f"has fractions ({some(fractions)}), each of which would be a label of its own; {_REGRESSION}"
        missing = [name for name in names if name.casefold() in _MISSING]
        if missing:
            return f"has the text {missing[0]!r}, which mostly stands for a missing value; remove these rows"
        if len(self._places) > 1 and len(numeric) < len(names):
            listed = ", ".join(f"row {row} has {value!r:.60}" for row, value in self._places.values())
            return f"mixes kinds of values ({listed}); write all labels in one way"
        alike = _alike(names)
        if alike is not None:
            return f"has labels that look alike, {alike[0]!r} and {alike[1]!r}; write them in one way"
        once = 2 * len(names) > self.counts.total()
        numbers = all(map(WHOLE.fullmatch, names))
        gaps = numbers and int(names[-1]) - int(names[0]) >= len(names)
        if gaps and (len(names) > FEW or (once and len(names) > 2)):
            return (
                f"has {len(names):,} different whole numbers with gaps between them ({some(names)}), which look like "
                f"measurements; {_REGRESSION}"
            )
        if once and len(names) > FEW:
            return (
                f"has {len(names):,} different labels on {self.counts.total():,} places ({some(names)}), too many to "
                "learn from so few; see that it is the right column"
            )
        return None


def number_of(name: str, known: Mapping[str, int], place: str) -> int:
    """The number of a label among those that are ``known``; ``place``: "row 3 of eval.csv has the label".

    Raises `UserError`.
    """
    if name in known:
        return known[name]
    alike = next((other for other in known if _folded(other) == _folded(name)), None)
    near = "" if alike is None else f" (is {alike!r} meant?)"
    raise UserError(
        f"{place} {name!r}, but the labels are {some(known)}{near}; correct the row, or name all labels in task.labels"
    )


def some(names: Iterable[str], limit: int = 12) -> str:
    """The first of them, and how many there are."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (f", … ({len(listed):,} in all)" if len(listed) > limit else "")


def _order(name: str) -> tuple[bool, int, str]:
    whole = WHOLE.fullmatch(name) is not None
    return not whole, int(name) if whole else 0, name


def _alike(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that differ in case, or in how their characters are encoded, only."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(_folded(name), name)
        if other != name:
            return other, name
    return None


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()
