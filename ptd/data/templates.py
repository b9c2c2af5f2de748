"""Parse templates: ``data.prompt_template`` and ``task.patterns``, with marks for virtual tokens and masks.

A template is text with ``{column}`` fields, ``{v:n}`` for n virtual tokens and ``{mask}`` for the position of a label's
word; ``{{`` and ``}}`` are literal braces. The text between two marks is tokenised as one string, as if the marks were
special tokens. Spaces before a mark are dropped, because most tokenizers make them part of the word after them.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ptd.config import DataConfig
from ptd.data.fields import TEXT_OR_NUMBER, Column, blank, cell
from ptd.types import UserError
from ptd.values import is_blank

MASK_SLOT = -(2**31)
"""The id that replaces ``{mask}`` in filled templates: neither a token nor a `virtual_id`."""


@dataclass(frozen=True)
class Text:
    """Literal text."""

    text: str


@dataclass(frozen=True)
class Field:
    """The value of a column."""

    column: str


@dataclass(frozen=True)
class Mask:
    """The position of a label's word."""


@dataclass(frozen=True)
class Virtual:
    """Virtual tokens ``first`` to ``first + count - 1``."""

    first: int
    count: int


Part = Text | Field | Mask | Virtual
Run = tuple[Text | Field, ...]


@dataclass(frozen=True)
class Template:
    """A parsed template. ``key`` is the configuration key that messages name; ``mapped`` are the fields whose columns
    ``data.columns`` may name."""

    source: str
    parts: tuple[Part, ...]
    key: str
    mapped: tuple[str, ...] = ()

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The columns of the fields, in the order of the template."""
        return tuple(part.column for part in self.parts if isinstance(part, Field))

    @cached_property
    def virtual_tokens(self) -> int:
        return sum(part.count for part in self.parts if isinstance(part, Virtual))

    @cached_property
    def masks(self) -> int:
        return sum(isinstance(part, Mask) for part in self.parts)

    @cached_property
    def pieces(self) -> tuple[Run | Mask | Virtual, ...]:
        """The marks and the runs of text between them, without the spaces of literal text before a mark."""
        pieces: list[Run | Mask | Virtual] = []
        run: list[Text | Field] = []
        for part in self.parts:
            if isinstance(part, Text | Field):
                run.append(part)
                continue
            if run and isinstance(run[-1], Text):
                run[-1] = Text(run[-1].text.rstrip(" "))
            pieces += [tuple(run), part]
            run = []
        return tuple(piece for piece in (*pieces, tuple(run)) if piece != ())

    @cached_property
    def mask_context(self) -> tuple[str, str]:
        """The literal text directly before ``{mask}``, and the spaces between that text and the mask."""
        place = self.parts.index(Mask())
        before = self.parts[place - 1] if place else Text("")
        text = before.text if isinstance(before, Text) else ""
        return text.rstrip(" "), text[len(text.rstrip(" ")) :]

    def up_to_mask(self) -> Template:
        """Return the template without the parts after ``{mask}``."""
        return replace(self, parts=self.parts[: self.parts.index(Mask()) + 1])

    def with_columns(self, columns: Mapping[str, str]) -> Template:
        """Return the template with each field that ``columns`` names replaced by its column."""
        parts = (
            Field(columns[part.column]) if isinstance(part, Field) and part.column in columns else part
            for part in self.parts
        )
        return replace(self, parts=tuple(parts))

    def check_columns(self, columns: Sequence[str], what: str) -> None:
        """Raise `UserError` if a field is not one of ``columns``."""
        for name in self.fields:
            if name not in columns:
                written = f"{{{name}}}" if f"{{{name}}}" in self.source else repr(name)
                hint = ""
                if name in self.mapped:
                    hint = f" Name one of these columns in the template, or give data.columns: {{{name}: COLUMN}}."
                raise UserError(
                    f"{self.key}: {written} is not a column of {what}; it has {', '.join(columns)} "
                    f"(only plain {{column}} fields are allowed; write {{{{ for a brace).{hint}"
                )

    def values(self, columns: dict[str, list[Any]], first: int, what: str) -> list[tuple[str, ...]]:
        """Return each row's values for the fields, as text; numbers are allowed, for example in "{a} + {b} =".

        ``first``: number of the first row. Raises `UserError` for values that are neither text nor numbers, and for
        rows in which every field is blank.
        """
        fields = [Column(name, TEXT_OR_NUMBER, may_be_blank=True, used_by=self.key) for name in self.fields]
        size = len(next(iter(columns.values())))
        found = [
            tuple(cell(columns[field.name][row], field, first + row, what) for field in fields) for row in range(size)
        ]
        for row, values in enumerate(found, first):
            if values and all(map(is_blank, values)):
                raise blank(f"row {row} of {what}", ", ".join(map(repr, dict.fromkeys(self.fields))))
        return found


def parse_template(source: str, key: str = "data.prompt_template") -> Template:
    """Parse a template; virtual tokens are numbered in the order of the template. Raises `UserError`."""
    try:
        found = list(string.Formatter().parse(source))
    except ValueError as error:
        raise UserError(
            f"{key}: {source!r} has an unpaired brace ({error}); write a field as {{column}} and a brace as {{{{"
        ) from error
    parts: list[Part] = []
    virtual = 0
    for text, name, spec, conversion in found:
        if text:
            # Formatter splits literal text at an escaped brace: join the pieces.
            before = parts.pop().text if parts and isinstance(parts[-1], Text) else ""  # type: ignore[union-attr]
            parts.append(Text(before + text))
        if name is None:
            continue
        if name == "v":
            count = int(spec) if spec and spec.isdecimal() and not conversion else 0
            if count < 1:
                raise UserError(
                    f"{key}: {source!r} has {{v{':' + spec if spec else ''}}}, which does not say how many virtual "
                    "tokens stand there; write {v:n}, e.g. {v:3} (a column named v cannot be used: rename it)"
                )
            parts.append(Virtual(virtual, count))
            virtual += count
        elif spec or conversion:
            written = f"{{{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}"
            raise UserError(f"{key}: {written} cannot be used; write a plain {{column}} field, or a brace as {{{{")
        else:
            parts.append(Mask() if name == "mask" else Field(name))
    return Template(source, tuple(parts), key)


def marks_of(templates: Sequence[str], key: str = "data.prompt_template") -> int:
    """Return how many virtual tokens the ``{v:n}`` marks of each template stand for; 0 without templates.

    Raises `UserError` if the number differs between templates, because all of them use the same trained tokens.
    """
    counts = {source: parse_template(source, key).virtual_tokens for source in templates}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} in {source!r}" for source, count in counts.items())
        raise UserError(
            f"{key}: the number of virtual tokens differs: {listed}; all templates share the same trained tokens, "
            "so give each the same number of {v:n} tokens"
        )
    return next(iter(counts.values()), 0)


def parse_templates(
    sources: Sequence[str], names: Sequence[str], data: DataConfig, key: str = "data.prompt_template"
) -> tuple[Template, ...]:
    """Parse templates whose fields ``names`` (those of the task) are read from the columns in ``data.columns``.

    Every other field is the name of a column. Raises `UserError` as `parse_template` does, and if ``data.columns``
    names a column for one of ``names`` that occurs in no template.
    """
    columns = {name: data.columns[name] for name in names if name in data.columns}
    found = [replace(parse_template(source, key), mapped=tuple(names)) for source in sources]
    for name in columns:
        if found and all(name not in template.fields for template in found):
            raise UserError(
                f"data.columns.{name}: has no effect, because {key} has no field {{{name}}}; write {{{name}}} in it, "
                "or remove the column"
            )
    return tuple(template.with_columns(columns) for template in found)


def prompt_template(data: DataConfig, columns: Sequence[str], what: str) -> Template | None:
    """Return the parsed ``data.prompt_template``, checked against the data's columns; None if it is not set.

    Raises `UserError` for a field that is not a column, for ``{mask}``, and as `parse_templates` does.
    """
    if data.prompt_template is None:
        return None
    (template,) = parse_templates([data.prompt_template], ["prompt"], data)
    template.check_columns(columns, what)
    if template.masks:
        raise UserError(
            "data.prompt_template: {mask} has no meaning where text is generated; it belongs in task.patterns "
            "of task.kind classification (a column named mask cannot be used: rename it)"
        )
    return template
