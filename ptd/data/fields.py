"""Read the columns of a task in chunks of rows, check their cells, and set how a tokenizer truncates texts.

`cell` applies one rule to every column of every task:

- A *missing* cell (null, NaN, a key that the row lacks) raises `UserError` with the number of its row.
- A *blank* cell (no text, or only white space) does so as well, except where an empty text has a meaning: in a prompt,
  in one of several fields of a template or pattern, and in the answers to a question, where it means "no answer".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptd.data.collecting import ROWS_PER_PIECE
from ptd.types import UserError
from ptd.values import is_blank, is_missing

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TEXT, TEXT_OR_NUMBER = "text", "text or a number"


@dataclass(frozen=True)
class Column:
    """A column that a task reads.

    ``holds``: `TEXT`; `TEXT_OR_NUMBER`, which is read as text; or a description of values that the task checks itself.
    ``may_be_blank``: an empty text has a meaning. ``may_lack``: the column is optional. ``used_by``: the key of the run
    file that names the column, if there is one.
    """

    name: str
    holds: str = TEXT
    may_be_blank: bool = False
    may_lack: bool = False
    used_by: str = ""


def field_chunks(rows: Dataset, fields: Mapping[str, Column], what: str) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Yield ``fields`` (field -> column), checked, of up to 1000 rows at a time, with the first row's number (from 1).

    A chunk omits fields whose optional column does not exist. Raises `UserError` if any other column does not exist,
    or if `cell` refuses a value.
    """
    for field, column in fields.items():
        if not column.may_lack:
            check_column(rows, field, column.name, what)
    present = {field: column for field, column in fields.items() if column.name in rows.column_names}
    rows = rows.select_columns(sorted({column.name for column in present.values()})).with_format(None)
    for begin in range(0, len(rows), ROWS_PER_PIECE):
        piece = rows[begin : begin + ROWS_PER_PIECE]
        yield (
            begin + 1,
            {
                field: [cell(value, column, row, what) for row, value in enumerate(piece[column.name], begin + 1)]
                for field, column in present.items()
            },
        )


def cell(value: Any, column: Column, row: int, what: str) -> Any:
    """Return the value of a cell as the task reads it; raise `UserError` for a missing, blank or wrong value.

    The error names the ``row`` of ``what``.
    """
    if isinstance(value, str) and (column.may_be_blank or not is_blank(value)):  # the usual case
        return value
    place = f"row {row} of {what}"
    said = f"{column.name!r}, which {column.used_by} uses," if column.used_by else repr(column.name)
    if is_missing(value):
        if column.used_by:
            raise UserError(f"{place}: {said} is missing; fill it in or remove the row")
        raise UserError(
            f"{place} has no {said}: {said} has to be {column.holds}, but is missing; add it or remove the row"
        )
    if column.holds == TEXT_OR_NUMBER and isinstance(value, int | float):
        if not math.isfinite(value):
            raise UserError(f"{place}: {said} is {value}, but has to be a finite number; correct or remove the row")
        return str(value)
    if column.holds in (TEXT, TEXT_OR_NUMBER) and not isinstance(value, str):
        if column.used_by:
            raise UserError(
                f"{place}: {said} is {type(value).__name__}, but has to be {column.holds}; convert it or remove the row"
            )
        raise UserError(
            f"{place}: {said} has to be {column.holds}, but is {type(value).__name__} ({repr(value)[:60]}); write it "
            "as a string"
        )
    if isinstance(value, str):
        raise blank(place, said, "text with at least one token" if column.holds == TEXT else column.holds)
    return value


def blank(place: str, said: str, holds: str = "text with at least one token") -> UserError:
    """Return the error for a blank cell; ``said`` names its column, or several columns."""
    return UserError(f"{place} has an empty {said}: {said} has to be {holds}; fill it in or remove the row")


def check_column(rows: Dataset, field: str, column: str, what: str) -> None:
    """Raise `UserError` if the rows have no ``column`` to read the ``field`` from."""
    if column in rows.column_names:
        return
    near = next((name for name in rows.column_names if name.strip().casefold() == column.strip().casefold()), None)
    example = near or rows.column_names[0]
    example = example if example.strip() == example else repr(example)
    meant = "" if near is None else f" (is {near!r} meant? case and spaces matter)"
    raise UserError(
        f"{what} has no column {column!r}; it has {', '.join(rows.column_names)}{meant}. "
        f"Name the column that holds the {field}, e.g. data.columns: {{{field}: {example}}}"
    )


@contextmanager
def cut_on_the_right(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Make the tokenizer truncate on the right; some have ``truncation_side: left``, which suits decoder prompts."""
    before, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        yield
    finally:
        tokenizer.truncation_side = before
