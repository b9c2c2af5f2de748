"""Turn rows into the sequences that a classifier reads, laid out by the tokenizer or by patterns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptd.data.fields import TEXT_OR_NUMBER, Column, cut_on_the_right, field_chunks
from ptd.data.filling import fill, special_affixes
from ptd.data.templates import Template
from ptd.tasks.cloze import Variant
from ptd.types import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Laid:
    """The sequences of some consecutive ``rows``, row by row; the positions that are read in each; how many were cut.

    ``types``: token types, if the tokenizer distinguishes two texts with them in any of these rows.
    """

    rows: int
    sequences: list[list[int]]
    read: list[range]
    cut: int
    types: list[list[int]] | None = None


def text_sequences(
    rows: Dataset,
    fields: dict[str, str],
    pair_given: bool,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    what: str,
) -> Iterator[Laid]:
    """Yield one sequence per row, read at its first position: the tokenizer's encoding of ``text`` (and ``pair``).

    ``fields``: field -> column; the column of ``pair`` is optional unless ``pair_given``. In a sequence over
    ``max_length`` tokens the longer text loses its end. Raises `UserError` for rows that are not text or have no
    tokens.
    """
    columns = {field: Column(name, may_lack=field == "pair" and not pair_given) for field, name in fields.items()}
    for first, chunk in field_chunks(rows, columns, what):
        texts = [chunk[field] for field in ("text", "pair") if field in chunk]
        special = tokenizer.num_special_tokens_to_add(pair=len(texts) > 1)
        if special >= max_length:
            raise UserError(f"data.max_length: {max_length} leaves no room next to {special} special tokens; raise it")
        with cut_on_the_right(tokenizer):
            encoded = tokenizer(*texts, truncation=True, max_length=max_length, return_attention_mask=False)
        ids = encoded["input_ids"]
        cut = 0
        full = [place for place, row in enumerate(ids) if len(row) == max_length]
        if full:
            whole = tokenizer(*([column[place] for place in full] for column in texts), verbose=False)["input_ids"]
            cut = sum(len(row) > max_length for row in whole)
        for row, found in enumerate(ids, first):
            if not found:
                raise UserError(f"row {row} of {what} has no tokens; remove the row")
        types = encoded.get("token_type_ids") or []
        yield Laid(len(ids), ids, [range(1)] * len(ids), cut, types if any(map(any, types)) else None)


def pattern_sequences(
    rows: Dataset,
    templates: Sequence[Template],
    variants: Sequence[Variant] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    what: str,
    *,
    cut_tail: bool,
) -> Iterator[Laid]:
    """Yield one sequence per row and variant, read at the mask; without ``variants``, one per row and pattern.

    A sequence without variants is read at its first position. All variants of a pattern see the same text, cut so that
    the longest variant fits. ``cut_tail``: a causal model reads the pattern up to its mask, without closing special
    tokens. Raises `UserError` for values that are neither text nor numbers, and for a row without a token to read.
    """
    head, tail = special_affixes(tokenizer)
    affixes = (head, [] if cut_tail else tail)
    columns = {
        name: Column(name, TEXT_OR_NUMBER, may_be_blank=True, used_by=template.key)
        for template in templates
        for name in template.fields
    }
    for template in templates:
        template.check_columns(rows.column_names, what)
    widest = [
        max((len(variant.inserted) for variant in variants or () if variant.pattern == number), default=0)
        for number in range(len(templates))
    ]
    for first, chunk in field_chunks(rows, columns, what):
        filled = [
            fill(
                template.up_to_mask() if cut_tail else template,
                template.values(chunk, first, what),
                tokenizer,
                affixes,
                max_length=max_length,
                mask_width=width,
            )
            for template, width in zip(templates, widest, strict=True)
        ]
        cut = max(rows_cut for _, rows_cut in filled)  # nearly always the longest pattern cuts these rows as well
        laid = Laid(len(filled[0][0]), [], [], cut)
        for row in range(laid.rows):
            of_row = [made[row] for made, _ in filled]
            found = (
                [(ids, range(1)) for ids in of_row]
                if variants is None
                else [variant.apply(of_row[variant.pattern]) for variant in variants]
            )
            for ids, read in found:
                if not ids or read.start < 0:
                    raise UserError(
                        f"row {first + row} of {what} leaves no token to read in a pattern; remove the row, or add "
                        "text to the pattern"
                    )
                laid.sequences.append(ids)
                laid.read.append(read)
        yield laid
