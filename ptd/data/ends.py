"""The tokens that end a text: the tokenizer's, those the model's author names, and those that training taught."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ptd.data.continuations import Reader
from ptd.data.filling import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def ends_of_text(
    tokenizer: PreTrainedTokenizerBase, named: int | Sequence[int] | None, taught: Iterable[int], vocab_size: int
) -> tuple[tuple[int, ...], str | None]:
    """All ids that end a text, sorted, and a note on those that were left out (None: there is none).

    ``named``: by the model's author (``generation_config.eos_token_id``); ``taught``: by the task or a training. An id
    that the author names but that is an ordinary piece of text in this tokenizer ends nothing: configs are often left
    with the default of their class, and a text would break off at the first "#". Ids beyond ``vocab_size`` cannot be
    predicted.
    """
    given = [named] if isinstance(named, int) else list(named or [])
    ordinary = [token for token in given if token not in taught and is_text(tokenizer, token)]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = {token for token in (*taught, *own, *given) if token not in ordinary and 0 <= token < vocab_size}
    if not ordinary:
        return tuple(sorted(found)), None
    listed = ", ".join(f"{token} ({Reader(tokenizer).text([token])!r})" for token in ordinary)
    return tuple(sorted(found)), f"the model's generation_config ends texts at {listed}: ordinary text here, not an end"


def is_text(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether ``token`` stands for ordinary text: no special or added token, and what a text can be tokenised to."""
    if token in tokenizer.added_tokens_decoder or token in tokenizer.all_special_ids or token >= len(tokenizer):
        return False
    text = Reader(tokenizer).text([token])
    return bool(text) and any(token in ids for ids in encode(tokenizer, [text, f" {text}", f"a{text}"]))
