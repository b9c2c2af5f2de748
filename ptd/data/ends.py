"""Collect the tokens that end a text: from the tokenizer, the model's ``generation_config`` and training."""

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
    """Return the sorted ids of the tokens that end a text, and a note on ``named`` ids that are left out (or None).

    ``named``: the model's ``generation_config.eos_token_id``. ``taught``: the end tokens of the task or of a training
    run. An id that is only in ``named`` is left out if it stands for ordinary text in this tokenizer: configurations
    often keep the default of their class, and generation would stop at the first "#", for example. Ids of
    ``vocab_size`` and above are left out without a note, because the model cannot predict them.
    """
    given = [named] if isinstance(named, int) else list(named or [])
    ordinary = [token for token in given if token not in taught and is_text(tokenizer, token)]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = {token for token in (*taught, *own, *given) if token not in ordinary and 0 <= token < vocab_size}
    if not ordinary:
        return tuple(sorted(found)), None
    listed = ", ".join(f"{token} ({Reader(tokenizer).text([token])!r})" for token in ordinary)
    return tuple(sorted(found)), (
        f"generation does not stop at {listed}, which generation_config names: in this tokenizer it is ordinary text"
    )


def is_text(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Return whether ``token`` is ordinary text: not special, not added, and found when its text is tokenised."""
    if token in tokenizer.added_tokens_decoder or token in tokenizer.all_special_ids or token >= len(tokenizer):
        return False
    text = Reader(tokenizer).text([token])
    return bool(text) and any(token in ids for ids in encode(tokenizer, [text, f" {text}", f"a{text}"]))
