"""Check on the first rows whether training matches inference, and describe the differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ptd.data.continuations import Reader
from ptd.data.filling import encode
from ptd.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptd.data.prompts import Written

ROWS = 64
"""Number of rows that are checked."""


def notes_on_rows(
    rows: Sequence[Written],
    asked: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    what: str,
    continues: bool,
) -> list[str]:
    """Return a sentence for each kind of difference between training and inference in the first ``rows``.

    ``asked``: the prompts that inference makes from the same rows. ``continues``: evaluation generates completions and
    compares them with the rows' text, so the tokenizer has to reproduce that text. Raises `UserError` if all of the
    text to be learned is unknown to the tokenizer.
    """
    ids, reader = [_own(row, tokenizer) for row in rows], Reader(tokenizer)
    _check_known([row.text for row in rows], ids, reader, what)
    pairs = list(zip(rows, ids, strict=True))
    texts = [reader.behind(row.prompt, own, skip_special_tokens=False) for row, own in pairs]
    apart = [
        place
        for place, (row, own) in enumerate(pairs)
        if texts[place] != row.text and not _reads_joined(row, own, reader)
    ]
    other = [place for place, row in enumerate(rows) if list(asked[place]) != row.prompt]
    notes = _told(
        other,
        len(rows),
        "in ROWS rows inference sends another prompt than training uses",
        lambda place: f"from token {_first_difference(rows[place].prompt, asked[place]) + 1} on",
    )
    notes += _told(
        apart,
        len(rows),
        "in ROWS rows the tokens do not decode to the prompt followed by the completion",
        lambda place: f"{rows[place].text[:30]!r} is learned as {texts[place][:30]!r}",
    )
    if not continues:
        return notes
    wanted = [row.text for row in rows]
    notes += _lossy(wanted, [wanted[place] if place in apart else text for place, text in enumerate(texts)], reader)
    eos = tokenizer.eos_token_id
    stops = [place for place, row in enumerate(rows) if eos is not None and eos in _learned(row)[:-1]]
    notes += _told(
        stops,
        len(rows),
        f"ROWS completions contain {tokenizer.eos_token} before their end, where generation stops",
        lambda place: repr(rows[place].text[:40]),
    )
    return notes


def notes_on_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, what: str) -> list[str]:
    """Return notes on the first target texts of an encoder-decoder; raise `UserError` if all of them are unknown."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(text_target=list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    reader = Reader(tokenizer)
    _check_known(texts, ids, reader, what)
    return _lossy(texts, [reader.text(row) for row in ids], reader)


def _told(places: list[int], size: int, said: str, example: Callable[[int], str]) -> list[str]:
    if not places:
        return []
    counted = said.replace("ROWS", f"{len(places)} of the first {size}")
    return [f"{counted} (row {places[0] + 1}: {example(places[0])})"]


def _check_known(texts: Sequence[str], ids: list[list[int]], reader: Reader, what: str) -> None:
    tokenizer = reader.tokenizer
    unknown = tokenizer.unk_token_id

    def knows(row: list[int]) -> bool:
        return unknown not in row or bool(reader.text([token for token in row if token != unknown]).strip())

    if unknown is not None and ids and not any(map(knows, ids)):
        raise UserError(
            f"{what}: the tokenizer {tokenizer.name_or_path!r} knows none of the text to be learned in the first "
            f"{len(ids)} rows (e.g. {texts[0][:40]!r}); use a backbone for texts of this kind"
        )


def _lossy(wanted: Sequence[str], found: Sequence[str], reader: Reader) -> list[str]:
    pairs = [tuple(reader.plain(text).strip() for text in pair) for pair in zip(wanted, found, strict=True)]
    return _told(
        [place for place, (text, written) in enumerate(pairs) if text != written],
        len(pairs),
        "the tokenizer cannot reproduce ROWS completions, so generated text cannot match them exactly",
        lambda place: " becomes ".join(repr(text[:30]) for text in pairs[place]),
    )


def _own(row: Written, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the completion's tokens without EOS, if EOS was appended to the text."""
    appended = row.completion[-1] == tokenizer.eos_token_id
    written = tokenizer.eos_token is not None and row.text.rstrip().endswith(tokenizer.eos_token)
    return row.completion[:-1] if appended and not written else row.completion


def _learned(row: Written) -> list[int]:
    """Return the completion up to its last supervised token."""
    mask = row.learned[len(row.prompt) :]
    return row.completion[: mask.rfind(1) + 1]


def _reads_joined(row: Written, own: list[int], reader: Reader) -> bool:
    """Return whether prompt and completion decode to the same text as the tokens of their joined texts."""
    before, both = encode(reader.tokenizer, [row.before, row.before + row.text])
    return reader.text(before + own) == reader.text(both)


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
