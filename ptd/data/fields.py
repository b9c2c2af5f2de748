"""The columns that a task reads, some rows at a time; what a cell may be; and how a tokenizer cuts texts.

One rule for every column of every task, in `cell`:

- A *missing* cell (null, NaN, a key that the row lacks) is refused, with its row.
- So is a *blank* one (no text, or only white space), but where having no text says something: in a prompt, in a field
  of a template or pattern beside others, and in the answers to a question, where it means that there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptd.types import UserError
from ptd.values import is_blank, is_missing

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_ROWS_AT_ONCE = 1000

TEXT, TEXT_OR_NUMBER = "text", "text or a number"


@dataclass(frozen=True)
class Column:
    """A column that a task reads.

    ``holds``: `TEXT`; `TEXT_OR_NUMBER`, which comes as text; or what the task looks at itself, in words.
    ``may_be_blank``: no text says something here. ``may_lack``: the data need not have the column. ``used_by``: the
    key of the run file that names the column, if one does.
    """

    name: str
    holds: str = TEXT
    may_be_blank: bool = False
    may_lack: bool = False
    used_by: str = ""


def field_chunks(rows: Dataset, fields: Mapping[str, Column], what: str) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """``fields`` (field -> column) of up to 1000 rows at a time, checked, with the first row's number (from 1).

    A chunk lacks the fields whose column the data may lack, and does. Raises `UserError` for any other column that is
    not there, and as `cell` does.
    """
    for field, column in fields.items():
        if not column.may_lack:
            check_column(rows, field, column.name, what)
    present = {field: column for field, column in fields.items() if column.name in rows.column_names}
    rows = rows.select_columns(sorted({column.name for column in present.values()})).with_format(None)
    for begin in range(0, len(rows), _ROWS_AT_ONCE):
        piece = rows[begin : begin + _ROWS_AT_ONCE]
        yield (
            begin + 1,
            {
                field: [cell(value, column, row, what) for row, value in enumerate(piece[column.name], begin + 1)]
                for field, column in present.items()
            },
        )


def cell(value: Any, column: Column, row: int, what: str) -> Any:
    """The value of a cell as the task reads it. Raises `UserError`, naming the ``row`` of ``what``."""
    if isinstance(value, str) and (column.may_be_blank or not is_blank(value)):  # nearly always
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
            raise UserError(f"{place}: {said} is {value}, which is no number to write; correct or remove the row")
        return str(value)
    if column.holds in (TEXT, TEXT_OR_NUMBER) and not isinstance(value, str):
        if column.used_by:
            raise UserError(f"{place}: {said} is {type(value).__name__}, not {column.holds}")
        raise UserError(
            f"{place}: {said} has to be {column.holds}, but is {type(value).__name__} ({repr(value)[:60]}); write it "
            "as a string"
        )
    if isinstance(value, str):
        raise blank(place, said, "text with at least one token" if column.holds == TEXT else column.holds)
    return value


def blank(place: str, said: str, holds: str = "text with at least one token") -> UserError:
    """The refusal of a cell with nothing in it; ``said``: its column, or several."""
    return UserError(f"{place} has an empty {said}: {said} has to be {holds}; fill it in or remove the row")


def check_column(rows: Dataset, field: str, column: str, what: str) -> None:
    """Raise `UserError` if there is no such column."""
    if column in rows.column_names:
        return
    near = next((name for name in rows.column_names if name.strip().casefold() == column.strip().casefold()), None)
    example = near or rows.column_names[0]
    example = example if example.strip() == example else repr(example)
    meant = "" if near is None else f" (is {near!r} meant? case and spaces count)"
    raise UserError(
        f"{what} has no column {column!r}; it has {', '.join(rows.column_names)}{meant}. "
        f"Name the column that holds the {field}, e.g. data.columns: {{{field}: {example}}}"
    )


@contextmanager
def cut_on_the_right(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Some tokenizers come with ``truncation_side: left``, which suits prompts of a decoder."""
    before, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        yield
    finally:
        tokenizer.truncation_side = before
