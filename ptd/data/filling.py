"""Fill templates with the values of rows, tokenise them, and cut them without losing marks or literal text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptd.data.templates import MASK_SLOT, Field, Mask, Run, Template, Virtual
from ptd.types import UserError, virtual_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fill(
    template: Template,
    values: Sequence[tuple[str, ...]],
    tokenizer: PreTrainedTokenizerBase,
    affixes: tuple[list[int], list[int]],
    *,
    max_length: int | None = None,
    mask_width: int = 1,
) -> tuple[list[list[int]], int]:
    """Return one sequence per row of ``values`` (the values of its fields, in order), and how many sequences were cut.

    ``affixes``: the special tokens before and after the text. `MASK_SLOT` takes the place of ``{mask}`` and counts as
    ``mask_width`` tokens. In a sequence over ``max_length`` tokens, the fields lose their last tokens, always the
    longest field first (Schick & Schütze 2021, PET); literal text, marks and special tokens stay. A token with both a
    field's and literal characters counts as literal (spaces are ignored). Raises `UserError` if the parts that have to
    stay are too long already.
    """
    runs = [piece for piece in template.pieces if isinstance(piece, tuple)]
    texts = [["".join(parts) for parts in _spread(runs, row)] for row in values]
    encoded = iter(encode(tokenizer, [text for row in texts for text in row]))
    fixed = sum(map(len, affixes)) + template.virtual_tokens + mask_width * template.masks
    sequences, cut = [], 0
    for row in values:
        ids = [next(encoded) for _ in runs]
        excess = 0 if max_length is None else fixed + sum(map(len, ids)) - max_length
        if excess > 0:
            assert max_length is not None
            ids = _cut(template, _spread(runs, row), tokenizer, sum(map(len, ids)) - excess, max_length)
            cut += 1
        sequences.append(_assemble(template, ids, affixes))
    return sequences, cut


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens."""
    if not texts:
        return []
    # verbose=False: no warning about texts longer than the model's context; callers cut, count and report these.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def special_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for begin in range(len(full) - len(bare) + 1 if bare else 0):
        if full[begin : begin + len(bare)] == bare:
            return full[:begin], full[begin + len(bare) :]
    # The tokens of "a" are empty or change between special tokens, so they do not show where a text would be. Split
    # the sequence before its trailing end tokens instead.
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {tokenizer.bos_token_id, None}
    end = len(full)
    while end and full[end - 1] in closing:
        end -= 1
    return full[:end], full[end:]


def affixed(ids: Sequence[int], head: Sequence[int], tail: Sequence[int] = ()) -> list[int]:
    """Return ``ids`` between the special tokens ``head`` and ``tail``, without repeating those that ``ids`` contains.

    Virtual tokens may come before or after the text.
    """
    ids, head, tail = list(ids), list(head), list(tail)
    first = next((place for place, token in enumerate(ids) if token >= 0), len(ids))
    if head and ids[first : first + len(head)] == head:
        del ids[first : first + len(head)]
    last = next((place for place in range(len(ids), 0, -1) if ids[place - 1] >= 0), 0)
    if tail and ids[max(last - len(tail), 0) : last] == tail:
        del ids[last - len(tail) : last]
    return head + ids + tail


def _spread(runs: Sequence[Run], values: Sequence[str]) -> list[list[str]]:
    """Return the text of each part of each run."""
    rest = iter(values)
    return [[next(rest) if isinstance(part, Field) else part.text for part in run] for run in runs]


def _assemble(template: Template, runs: list[list[int]], affixes: tuple[list[int], list[int]]) -> list[int]:
    ids: list[int] = []
    rest = iter(runs)
    for piece in template.pieces:
        if isinstance(piece, Virtual):
            ids += [virtual_id(piece.first + number) for number in range(piece.count)]
        else:
            ids += [MASK_SLOT] if isinstance(piece, Mask) else next(rest)
    return affixed(ids, *affixes)


def _cut(
    template: Template, texts: list[list[str]], tokenizer: PreTrainedTokenizerBase, room: int, max_length: int
) -> list[list[int]]:
    """Return ``room`` tokens of the runs: the longest fields lose their last tokens."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{template.key}: a row is longer than data.max_length ({max_length}), and cutting its fields needs a fast "
            f"tokenizer (one with tokenizer.json), which {tokenizer.name_or_path!r} is not; raise data.max_length"
        )
    runs = [piece for piece in template.pieces if isinstance(piece, tuple)]
    all_ids, owners, number = [], [], 0  # owner of a token: the number of its field, or -1 for literal text
    for run, parts in zip(runs, texts, strict=True):
        holders: list[int] = []
        for part, text in zip(run, parts, strict=True):
            holders += [number if isinstance(part, Field) else -1] * len(text)
            number += isinstance(part, Field)
        text = "".join(parts)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        all_ids.append(encoded["input_ids"])
        owners.append([_owner(text, holders, begin, end) for begin, end in encoded["offset_mapping"]])
    sizes = [sum(row.count(field) for row in owners) for field in range(number)]
    kept = _shares(sizes, room - sum(row.count(-1) for row in owners))
    if kept is None:
        raise UserError(
            f"{template.key}: {template.source!r} takes more than data.max_length ({max_length}) tokens without its "
            "fields; shorten it or raise data.max_length"
        )
    cut = []
    for ids, row in zip(all_ids, owners, strict=True):
        chosen = []
        for token, owner in zip(ids, row, strict=True):
            if owner >= 0:
                kept[owner] -= 1
            if owner < 0 or kept[owner] >= 0:
                chosen.append(token)
        cut.append(chosen)
    return cut


def _owner(text: str, holders: list[int], begin: int, end: int) -> int:
    inked = [holders[place] for place in range(begin, end) if not text[place].isspace()]
    if inked:
        return -1 if -1 in inked else inked[-1]
    # Some byte-level tokenizers give the space before a word no width (begin == end): it belongs to what follows.
    place = begin if begin < end else min(begin, len(holders) - 1)
    return holders[place] if holders else -1


def _shares(sizes: list[int], room: int) -> list[int] | None:
    """Return how many tokens each field keeps if the longest (of equals: the last) loses some until ``room`` are left.

    None if ``room`` is negative.
    """
    if room < 0:
        return None
    level = max(sizes, default=0)
    while sum(min(size, level) for size in sizes) > room:
        level -= 1
    shares = [min(size, level) for size in sizes]
    spare = room - sum(shares)
    for field, size in enumerate(sizes):
        if spare > 0 and size > level:
            shares[field] += 1
            spare -= 1
    return shares
