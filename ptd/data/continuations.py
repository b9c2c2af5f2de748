"""Tokenise a text as the continuation of another text, and decode the tokens of a continuation.

The tokens of a text depend on the text before it. SentencePiece-like tokenizers add a space before a text that they
tokenise alone and drop a space when they decode it alone; WordPiece marks tokens inside a word with ``##``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptd.data.filling import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("=", "x", "\n", ":", "0", "(", "。")
"""Texts to tokenise before a text that merges with its own context; hardly any text merges with all of them."""
_LEFT, _RIGHT = ("a", "a ", "a:", "a\n", "1", "("), ("a", " a", "\na", "1", ")", "'s", ".")
_TAIL = 8
"""Number of tokens before a text that determine how its first tokens are decoded."""


class Reader:
    """Decodes token ids. Reads the tokenizer's added and special tokens once, when it is created."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._apart = frozenset(added) | set(tokenizer.all_special_ids)
        special = {str(token) for token in tokenizer.all_special_tokens}
        self.added = _any_of(special | {token.content for token in added.values()})
        """Matches the text of every added or special token that is not blank; None: there are no such tokens."""
        self.special = _any_of(special | {token.content for token in added.values() if token.special})
        """Matches the text of every special token that is not blank; None: there are no such tokens."""

    def text(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids without cleaning up spaces; negative ids (virtual tokens) have no text."""
        text: str = self.tokenizer.decode(
            [token for token in ids if token >= 0],
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text

    def behind(self, before: Sequence[int], ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text that ``ids`` add to the text of the tokens ``before``.

        Added and special tokens separate texts: a text after one of them is decoded as if it were alone.
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
        """Return whether ``ids`` after the tokens ``before`` decode to ``text``, as far as the tokenizer can write it.

        Accepted are ``text`` and what encoding and decoding ``text`` alone gives, with white space at the start only if
        ``text`` has it there.
        """
        found = self.behind(before, ids, skip_special_tokens=False)
        if found == text:
            return True
        (alone,) = encode(self.tokenizer, [text])
        same = found.lstrip() == self.text(alone).lstrip()
        return same and bool(found) and found[0].isspace() == text[0].isspace()

    def plain(self, text: str) -> str:
        """Return ``text`` without the special tokens written in it, as generated text is decoded."""
        return self.special.sub("", text) if self.special is not None else text


def continuations(tokenizer: PreTrainedTokenizerBase, before: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text in ``texts`` as it continues the text in ``before``, which is tokenised alone.

    If the tokenizer's tokens can simply be concatenated (byte-level BPE), these are the tokens of the text alone.
    Otherwise they are the tokens that both texts together have after the tokens of the first. If one token spans the
    border, they are the tokens of the text after an anchor (`_ANCHORS`) whose own tokens do not change. A text that no
    attempt reproduces is tokenised alone.
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
    """Return whether the concatenated tokens of two texts always decode to the concatenated texts (on probe texts)."""
    pairs = [(left, right) for left in _LEFT for right in _RIGHT]
    whole = encode(reader.tokenizer, [left + right for left, right in pairs])
    # Skip pairs that the vocabulary cannot represent: some vocabularies lack the line break, for example.
    known = [pair for pair, ids in zip(pairs, whole, strict=True) if reader.text(ids) == "".join(pair)]
    ids_of = dict(zip(_LEFT + _RIGHT, encode(reader.tokenizer, [*_LEFT, *_RIGHT]), strict=True))
    return bool(known) and all(reader.text(ids_of[left] + ids_of[right]) == left + right for left, right in known)


def _any_of(words: set[str]) -> re.Pattern[str] | None:
    listed = sorted((word for word in words if word.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, listed))) if listed else None
