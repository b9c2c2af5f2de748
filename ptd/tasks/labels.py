"""Name the labels of rows, learn the set of labels from the data, and number the label of each row."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ptd.config import TaskConfig
from ptd.types import UserError
from ptd.values import WHOLE, name_of

Kind = Literal["number", "truth value", "text"]
FEW = 20
"""Up to this many whole numbers with gaps, or values that hardly occur twice, are accepted as labels."""

_NUMBER = re.compile(r"[+-]?([0-9]+[.,]?[0-9]*|[.,][0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
_MISSING = {"nan", "<na>", "nat"}
"""What pandas writes for a missing value when it turns values into text."""
_REGRESSION = "ptd has no task that predicts numbers (regression): turn the numbers into classes"


def name_at(value: Any, names: tuple[str, ...], place: str) -> str:
    """Return the name of the label ``value`` at ``place`` ("row 3 of train.csv: 'label'").

    ``names``: the names of the whole numbers from 0; empty: a number is its own name. Raises `UserError` for a value
    that is not a label.
    """
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if names and isinstance(number, int) and not isinstance(number, bool):
        if 0 <= number < len(names):
            return names[number]
        hidden = " (−1 usually stands for a hidden label)" if number == -1 else ""
        raise UserError(
            f"{place} is {number}{hidden}, but only the numbers from 0 to {len(names) - 1} stand for labels "
            f"({some(names)}); correct or remove the row"
        )
    name = name_of(value)
    if name is None:
        raise UserError(
            f"{place} has to be a label (text or a number), but is {type(value).__name__} ({repr(value)[:60]}); "
            "correct or remove the row"
        )
    return name


def names_of(feature: Any, column: str, what: str) -> tuple[str, ...]:
    """Return the names that a data set gives to the numbers of a ``ClassLabel``; empty if it gives none.

    Raises `UserError` for names that are blank or repeated.
    """
    given = getattr(feature, "names", None) or ()
    names = tuple(name_of(name) or "" for name in given)
    if "" in names or len(set(names)) < len(names):
        raise UserError(
            f"task.labels: {column!r} in {what} names its labels {some(map(repr, given))}, of which one is blank or "
            "repeated; give every label a name of its own"
        )
    return names


class Seen:
    """Counts the labels of the rows that the names are learned from, and keeps the first row of each kind of value."""

    def __init__(self, column: str, what: str) -> None:
        self.column, self.what = column, what
        self.counts: Counter[str] = Counter()
        self._places: dict[Kind, tuple[int, Any]] = {}

    def add(self, name: str, value: Any, row: int) -> None:
        """Count the label ``name``, which row ``row`` of the data has as ``value``."""
        self.counts[name] += 1
        kind: Kind = (
            "truth value" if isinstance(value, bool) else "number" if isinstance(value, int | float) else "text"
        )
        self._places.setdefault(kind, (row, value))

    def names(self) -> tuple[str, ...]:
        """Return the names in order: whole numbers by value, then the others.

        Raises `UserError` for values that are probably not a set of labels: fractions, whole numbers with gaps, nearly
        as many labels as rows, numbers among words, names that differ only in case, and missing values that became
        text. Labels that are listed in ``task.labels`` are not checked in this way.
        """
        names = sorted(self.counts, key=_order)
        doubt = self._doubt(names)
        if doubt is not None:
            raise UserError(
                f"task.labels: {self.column!r} in {self.what} {doubt}. If these are the labels nevertheless, list them "
                "in task.labels"
            )
        return tuple(names)

    def _doubt(self, names: list[str]) -> str | None:
        numeric = [name for name in names if _NUMBER.fullmatch(name)]
        fractions = [name for name in numeric if not float(name.replace(",", ".")).is_integer()]
        if fractions:
            return f"has fractions ({some(fractions)}), each of which would become a label of its own; {_REGRESSION}"
        missing = [name for name in names if name.casefold() in _MISSING]
        if missing:
            return f"has the text {missing[0]!r}, which usually stands for a missing value; remove these rows"
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
                f"has {len(names):,} different labels among {self.counts.total():,} values ({some(names)}), too "
                "many to learn from so few; check that it is the right column"
            )
        return None


def number_of(name: str, known: Mapping[str, int], place: str) -> int:
    """Return the number of a label; raise `UserError` if it is not among the ``known`` labels.

    ``place`` begins the message: "row 3 of eval.csv has the label".
    """
    if name in known:
        return known[name]
    alike = next((other for other in known if _folded(other) == _folded(name)), None)
    near = "" if alike is None else f" (is {alike!r} meant?)"
    raise UserError(
        f"{place} {name!r}, but the labels are {some(known)}{near}; correct the row, or name all labels in task.labels"
    )


def some(names: Iterable[str], limit: int = 12) -> str:
    """Return the first ``limit`` names as text, and the number of names if there are more."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (f", … ({len(listed):,} in all)" if len(listed) > limit else "")


def _order(name: str) -> tuple[bool, int, str]:
    whole = WHOLE.fullmatch(name) is not None
    return not whole, int(name) if whole else 0, name


def _alike(names: Iterable[str]) -> tuple[str, str] | None:
    """Return two names that differ only in case or in how their characters are encoded; None if there are none."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(_folded(name), name)
        if other != name:
            return other, name
    return None


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def with_assumed_labels(task: TaskConfig) -> TaskConfig:
    """Return the task with label names. A run may learn them from its data; where none are given, assume two."""
    if task.kind not in ("classification", "token_classification"):
        return task
    labels = task.labels or list(task.verbalizer or {"0": [], "1": []})
    weights = dict.fromkeys(labels, 1.0) if task.class_weights == "balanced" else task.class_weights
    return task.model_copy(update={"labels": labels, "class_weights": weights})
