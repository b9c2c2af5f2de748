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


class Reader:
    """How the tokens of a tokenizer, as it is now, read as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._apart = frozenset(added) | set(tokenizer.all_special_ids)
        special = {str(token) for token in tokenizer.all_special_tokens}
        self.added = _any_of(special | {token.content for token in added.values()})
        """Matches the text of any token that was added to the vocabulary and is not blank; None: there are none."""
        self.special = _any_of(special | {token.content for token in added.values() if token.special})
        """Matches that of a special token."""

    def text(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """What token ids say (negative ones are virtual), without the clean-up of spaces that some settings ask for."""
        text: str = self.tokenizer.decode(
            [token for token in ids if token >= 0],
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text

    def behind(self, before: Sequence[int], ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text that ``ids`` add to that of the tokens ``before``.

        Tokens added to the vocabulary part texts: behind one a text is read as it would be alone.
        """
        tail: list[int] = []
        for token in reversed(before):
            if token < 0 or token in self._apart or len(tail) == _TAIL:
                break
            tail.insert(0, token)
        first = self.text(tail, skip_special_tokens=skip_special_tokens)
        both = self.text([*tail, *ids], skip_special_tokens=skip_special_tokens)
        if both.startswith(first):
            return both[len(first) :]
        return self.text(ids, skip_special_tokens=skip_special_tokens)

    def reads_as(self, before: Sequence[int], ids: Sequence[int], text: str) -> bool:
        """Whether ``ids`` behind the tokens ``before`` are ``text``, but for what the tokenizer writes differently.

        That is: ``text``, or what it makes of ``text`` alone, with a space in front only if ``text`` has one.
        """
        found = self.behind(before, ids, skip_special_tokens=False)
        if found == text:
            return True
        (alone,) = encode(self.tokenizer, [text])
        same = found.lstrip() == self.text(alone).lstrip()
        return same and bool(found) and found[0].isspace() == text[0].isspace()

    def plain(self, text: str) -> str:
        """``text`` without what the tokenizer reads as special tokens in it, as generated text is decoded."""
        return self.special.sub("", text) if self.special is not None else text


def continuations(tokenizer: PreTrainedTokenizerBase, before: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each of ``texts`` as what follows the tokens of the text ``before`` it, which is tokenised alone.

    For tokenizers whose tokens simply join (byte-level BPE) these are the tokens of the text alone. For others they are
    what the two together have beyond the tokens of the first; where a token straddles the border, what the text has
    behind an anchor that keeps its tokens. Where nothing reads as the text, it is tokenised alone.
    """
    reader = Reader(tokenizer)
    if joins(reader):
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
            if not anchor or (ids[: len(head)] == head and reader.reads_as(firsts[row], rest, texts[row])):
                found[row] = rest
    return [found[row] for row in range(len(texts))]


def joins(reader: Reader) -> bool:
    """Whether the tokens of two texts, one behind the other, always read as the two texts joined."""
    pairs = [(left, right) for left in _LEFT for right in _RIGHT]
    whole = encode(reader.tokenizer, [left + right for left, right in pairs])
    # Not those that the vocabulary cannot write, as a line break in some.
    known = [pair for pair, ids in zip(pairs, whole, strict=True) if reader.text(ids) == "".join(pair)]
    ids_of = dict(zip(_LEFT + _RIGHT, encode(reader.tokenizer, [*_LEFT, *_RIGHT]), strict=True))
    return bool(known) and all(reader.text(ids_of[left] + ids_of[right]) == left + right for left, right in known)


def _any_of(words: set[str]) -> re.Pattern[str] | None:
    listed = sorted((word for word in words if word.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, listed))) if listed else None
