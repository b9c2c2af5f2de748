"""The columns that a task's fields name, some rows at a time, and how a tokenizer cuts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ptd.types import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_ROWS_AT_ONCE = 1000


def field_chunks(
    rows: Dataset, fields: dict[str, str], what: str, *, optional: tuple[str, ...] = ()
) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """``fields`` (field -> column) of up to 1000 rows at a time, with the first row's number (from 1).

    A chunk lacks the ``optional`` fields whose column the data lacks. Raises `UserError` for any other missing column,
    and for a value that is None.
    """
    for field, column in fields.items():
        if field not in optional:
            check_column(rows, field, column, what)
    present = {field: column for field, column in fields.items() if column in rows.column_names}
    rows = rows.select_columns(sorted(set(present.values()))).with_format(None)
    for begin in range(0, len(rows), _ROWS_AT_ONCE):
        piece = rows[begin : begin + _ROWS_AT_ONCE]
        for field, column in present.items():
            for row, value in enumerate(piece[column], begin + 1):
                if value is None and field not in optional:
                    raise UserError(f"row {row} of {what} has no {column!r}; add it or remove the row")
        yield begin + 1, {field: piece[column] for field, column in present.items()}


def check_column(rows: Dataset, field: str, column: str, what: str) -> None:
    """Raise `UserError` if there is no such column."""
    if column not in rows.column_names:
        raise UserError(
            f"{what} has no column {column!r}; it has {', '.join(rows.column_names)}. "
            f"Name the column that holds the {field}, e.g. data.columns: {{{field}: {rows.column_names[0]}}}"
        )


def check_text(value: Any, column: str, place: str) -> None:
    """Raise `UserError`, naming the ``place`` ("row 3 of train.jsonl"), if the value is no text."""
    if not isinstance(value, str):
        given = "missing" if value is None else f"{type(value).__name__} ({repr(value)[:60]})"
        raise UserError(f"{place}: {column!r} has to be text, but is {given}; write it as a string")


@contextmanager
def cut_on_the_right(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Some tokenizers come with ``truncation_side: left``, which suits prompts of a decoder."""
    before, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        yield
    finally:
        tokenizer.truncation_side = before
