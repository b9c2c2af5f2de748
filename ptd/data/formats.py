"""Tokenise rows of the formats prompt_completion, messages and text, and mark the supervised tokens.

`ptd.data.prompts` determines the tokens of a row; this module cuts the rows to length and concatenates them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ptd.config import DataConfig
from ptd.data.checks import ROWS, notes_on_rows
from ptd.data.collecting import ROWS_PER_PIECE, Columns, InMemory, Pieces, batched, collect
from ptd.data.filling import special_affixes
from ptd.data.prompts import PromptFindings, Written, written
from ptd.data.templates import marks_of
from ptd.types import DataReport, Examples, UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def tokenize(
    rows: Dataset,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    what: str,
    columns: Columns = InMemory,
) -> Examples:
    """Tokenise all rows in ``config.format``; ``what`` names the rows in messages ("row 3 of ``what`` …").

    - ``prompt_completion``: the completion and EOS are supervised. A completion that ends in EOS gets no second EOS.
    - ``messages``: what the assistant writes is supervised (see `ptd.data.chat`).
    - ``text``: the text and EOS are supervised; BOS is not.

    The first token of a row is never supervised, so without prompt and BOS the first completion token is not learned.
    In a row over ``max_length`` tokens the prompt is cut on the left, after the tokenizer's leading special tokens. If
    the completion alone is too long, it is cut on the right and keeps before it only the leading special tokens (or,
    without any, the last token of the prompt). Virtual tokens are never cut.

    The report describes where training on the first rows differs from what inference sends, and names the tokens that
    end the texts. ``columns``: where the arrays are stored. Raises `UserError`, naming the row, for a row that cannot
    be used.
    """
    _check_room(config, tokenizer, max_length)
    return collect(_pieces(rows, config, tokenizer, max_length, what), columns)


def _pieces(
    rows: Dataset, config: DataConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, what: str
) -> Pieces:
    found, first = PromptFindings(), list[Written]()
    for some in batched(written(rows, config, tokenizer, what, found), ROWS_PER_PIECE):
        first += some[: ROWS - len(first)]
        yield _piece(some, max_length)
    again = written(rows.select(range(len(first))), config, tokenizer, what, PromptFindings())
    asked = [row.prompt for row in again]
    notes = notes_on_rows(first, asked, tokenizer, what=what, continues=config.format != "text")
    notes = [*found.notes(tokenizer.eos_token), *notes]
    yield DataReport(0, 0, 0, notes=tuple(notes), ends=tuple(sorted(found.ends)))


def _piece(rows: Sequence[Written], max_length: int) -> Examples:
    tokens, supervised, offsets = array("i"), bytearray(), array("q", [0])
    prompts_cut = completions_cut = 0
    for row in rows:
        whole = row.prompt + row.completion
        ids, mask, prompt_cut, completion_cut = _fit(whole, row.learned, len(row.prompt), row.leading, max_length)
        prompts_cut += prompt_cut
        completions_cut += completion_cut
        tokens.extend(ids)
        supervised += mask
        supervised[offsets[-1]] = 0
        offsets.append(len(tokens))
    learned = np.frombuffer(supervised, dtype=bool)
    report = DataReport(len(rows), len(tokens), int(learned.sum()), prompts_cut, completions_cut)
    return Examples.of_text(
        np.frombuffer(tokens, dtype=np.int32), learned, np.frombuffer(offsets, dtype=np.int64), report
    )


def prompts_and_references(
    rows: Dataset, config: DataConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, *, what: str = "data.eval"
) -> tuple[list[list[int]], list[str]]:
    """Return each row's prompt as token ids, as in training, and its reference text, for evaluation by generation.

    Prompts over ``max_length`` tokens are cut on the left as in `tokenize`. With ``messages`` the prompt is everything
    before the last supervised message, rendered with the template's generation prompt, and the reference is what the
    template writes after it, without the end of the turn. Raises `UserError` for a row that cannot be used and for
    ``text``.
    """
    if config.format == "text":
        raise UserError("data.format: text has no prompts to generate from; use prompt_completion or messages")
    _check_room(config, tokenizer, max_length)
    prompts: list[list[int]] = []
    references: list[str] = []
    for number, row in enumerate(written(rows, config, tokenizer, what, PromptFindings()), start=1):
        if not row.prompt:
            raise UserError(
                f"row {number} of {what} has a prompt without tokens, but generation needs at least one; fill in the "
                "prompt or remove the row"
            )
        kept = row.prompt
        if len(kept) > max_length:
            kept = [row.prompt[place] for place in _kept(row.prompt, row.leading, max_length)]
        prompts.append(kept)
        references.append(row.reference)
    return prompts, references


def _fit(ids: list[int], mask: bytes, start: int, leading: int, max_length: int) -> tuple[list[int], bytes, bool, bool]:
    """Cut a row to ``max_length`` tokens; also return whether the prompt (before ``start``) and the rest were cut."""
    if len(ids) <= max_length:
        return ids, mask, False, False
    room = max_length - (len(ids) - start)
    # The first token of the completion is supervised only if another token comes before it.
    least = _staying(ids[:start], leading)[: max_length - 1] or list(range(max(start - 1, 0), start))
    kept = _kept(ids[:start], leading, room) if room >= len(least) else least
    chosen = [*kept, *range(start, start + max_length - len(kept))]
    return [ids[i] for i in chosen], bytes(mask[i] for i in chosen), len(kept) < start, room < len(least)


def _kept(prompt: list[int], leading: int, room: int) -> list[int]:
    """Return ``room`` positions: those of leading special and virtual tokens, and as many of the last others as fit."""
    staying = _staying(prompt, leading)[:room]
    others = sorted(set(range(len(prompt))) - set(staying))
    return sorted([*staying, *others[max(len(others) - (room - len(staying)), 0) :]])


def _staying(prompt: list[int], leading: int) -> list[int]:
    """Return the positions of the prompt's tokens that are never cut."""
    return [place for place, token in enumerate(prompt) if place < leading or token < 0]


def _check_room(config: DataConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raise `UserError` if virtual and special tokens, which are part of the sequence, leave no room for others."""
    marks = marks_of([config.prompt_template]) if config.prompt_template is not None else 0
    fixed = marks + len(special_affixes(tokenizer)[0])
    if marks and fixed >= max_length:
        raise UserError(
            f"data.prompt_template: {config.prompt_template!r} has {marks} virtual tokens, which with the special "
            f"tokens use up data.max_length ({max_length}); raise data.max_length"
        )
