"""A text that continues another -> the tokens a model has to write behind the other's, and such tokens -> their text.

What a text's tokens are depends on what stands before it. SentencePiece-like tokenizers put a space before a text that
is tokenised alone and drop one when they decode it alone; WordPiece glues the rest of a word with ``##``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptd.data.filling import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("=", "x", "\n", ":", "0", "(", "。")
"""Texts to put before one whose own context cannot be tokenised with it: one of them hardly ever merges with it."""
_LEFT, _RIGHT = ("a", "a ", "a:", "a\n", "1", "("), ("a", " a", "\na", "1", ")", "'s", ".")
_TAIL = 8
"""So many tokens before a text say how its first ones are read."""


def continuations(tokenizer: PreTrainedTokenizerBase, before: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each of ``texts`` as what follows the tokens of the text ``before`` it, which is tokenised alone.

    For tokenizers whose tokens simply join (byte-level BPE) these are the tokens of the text alone. For others they are
    what the two together have beyond the tokens of the first; where a token straddles the border, what the text has
    behind an anchor that keeps its tokens. Where nothing reads as the text (`reads_as`), it is tokenised alone.
    """
    if joins(tokenizer):
        return encode(tokenizer, list(texts))
    firsts = encode(tokenizer, list(before))
    both = encode(tokenizer, [first + text for first, text in zip(before, texts, strict=True)])
    found = {
        row: ids[len(first) :]
        for row, (first, ids) in enumerate(zip(firsts, both, strict=True))
        if ids[: len(first)] == first
    }
    for anchor in (*_ANCHORS, ""):
        open_rows = [row for row in range(len(texts)) if row not in found]
        (head,) = encode(tokenizer, [anchor])
        tried = encode(tokenizer, [anchor + texts[row] for row in open_rows])
        for row, ids in zip(open_rows, tried, strict=True):
            rest = ids[len(head) :]
            if not anchor or (ids[: len(head)] == head and reads_as(tokenizer, firsts[row], rest, texts[row])):
                found[row] = rest
    return [found[row] for row in range(len(texts))]


def joins(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens of two texts, one behind the other, always read as the two texts joined."""
    pairs = [(left, right) for left in _LEFT for right in _RIGHT]
    whole = encode(tokenizer, [left + right for left, right in pairs])
    known = [
        pair for pair, ids in zip(pairs, whole, strict=True) if read(tokenizer, ids) == "".join(pair)
    ]  # no newline, say, in the vocabulary
    ids_of = dict(zip(_LEFT + _RIGHT, encode(tokenizer, [*_LEFT, *_RIGHT]), strict=True))
    return bool(known) and all(read(tokenizer, ids_of[left] + ids_of[right]) == left + right for left, right in known)


def read(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of token ids as it is: without the clean-up of spaces that some tokenizers' settings ask for."""
    text: str = tokenizer.decode(
        [token for token in ids if token >= 0],
        skip_special_tokens=skip_special_tokens,
        clean_up_tokenization_spaces=False,
    )
    return text


def reads_as(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int], text: str) -> bool:
    """Whether ``ids`` behind the tokens ``before`` are ``text``, but for what the tokenizer writes differently anyway.

    That is: ``text``, or what it makes of ``text`` alone, with a space in front only if ``text`` has one.
    """
    found = text_behind(tokenizer, before, ids, skip_special_tokens=False)
    if found == text:
        return True
    (alone,) = encode(tokenizer, [text])
    same = found.lstrip() == read(tokenizer, alone).lstrip()
    return same and bool(found) and found[0].isspace() == text[0].isspace()


def text_behind(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int], *, skip_special_tokens: bool = True
) -> str:
    """The text that ``ids`` add to that of the tokens ``before`` (negative ones are virtual).

    Tokens added to the vocabulary part texts: behind one a text is read as it would be alone.
    """
    apart = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    tail: list[int] = []
    for token in reversed(before):
        if token < 0 or token in apart or len(tail) == _TAIL:
            break
        tail.insert(0, token)
    first = read(tokenizer, tail, skip_special_tokens=skip_special_tokens)
    both = read(tokenizer, [*tail, *ids], skip_special_tokens=skip_special_tokens)
    if both.startswith(first):
        return both[len(first) :]
    return read(tokenizer, ids, skip_special_tokens=skip_special_tokens)


def without_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """``text`` without what the tokenizer reads as special tokens in it, as generated text is decoded."""
    special = special_words(tokenizer)
    return special.sub("", text) if special is not None else text


def special_words(tokenizer: PreTrainedTokenizerBase, *, all_added: bool = False) -> re.Pattern[str] | None:
    """What matches the text of a special token (or of any ``added`` one that is not blank); None: there are none."""
    words = {str(token) for token in tokenizer.all_special_tokens}
    words |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special or all_added}
    listed = sorted((word for word in words if word.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, listed))) if listed else None
