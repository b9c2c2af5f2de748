"""What is looked at once rows are tokens: ids that the backbone has no embedding for, rows that are in two files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptd.types import Examples, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ADVICE = (
    "it was added to the tokenizer alone: resize the embedding (model.resize_token_embeddings(len(tokenizer))) and "
    "save model and tokenizer"
)


def check_special(tokenizer: PreTrainedTokenizerBase, embeddings: int | None) -> None:
    """Raise `UserError` if the padding token, which every padded batch has, is not among the ``embeddings`` rows."""
    pad = tokenizer.pad_token_id
    if embeddings is not None and pad is not None and pad >= embeddings:
        raise UserError(
            f"backbone.path: the tokenizer's padding token {tokenizer.pad_token!r} has the id {pad}, but the backbone's"
            f" embedding has {embeddings} rows; {_ADVICE}, or set pad_token to a token that the backbone has in "
            "tokenizer_config.json"
        )


def check_ids(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, embeddings: int | None, what: str, *, writes: bool
) -> None:
    """Raise `UserError`, naming the row of ``what``, for a token id that is not among the ``embeddings`` rows.

    ``embeddings``: None, if that is not known. ``writes``: the labels are token ids as well.
    """
    if embeddings is None:
        return
    check_special(tokenizer, embeddings)
    for side in (examples, examples.source):
        if side is not None:
            for ids in (side.tokens, *((side.labels,) if writes else ())):
                _check(ids, side.offsets[:: side.group], tokenizer, embeddings, what)


def check_words(ids: list[int], tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """The same for the tokens of ``task.verbalizer``."""
    beyond = next((token for token in ids if token >= embeddings), None)
    if beyond is not None:
        raise UserError(
            f"task.verbalizer: a word has the token {tokenizer.convert_ids_to_tokens(beyond)!r} with the id {beyond}, "
            f"but the backbone's embedding has {embeddings} rows; {_ADVICE}, or give another word"
        )


def check_prompts(prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, embeddings: int, what: str) -> None:
    """The same for prompts to be continued, which are called "row" and their number in ``what``. They need no padding
    token of the tokenizer's own."""
    offsets = np.cumsum([0, *map(len, prompts)])
    _check(np.array([token for prompt in prompts for token in prompt]), offsets, tokenizer, embeddings, what)


def _check(
    ids: np.ndarray, offsets: np.ndarray, tokenizer: PreTrainedTokenizerBase, embeddings: int, what: str
) -> None:
    beyond = np.flatnonzero(ids >= embeddings)
    if len(beyond):
        token = int(ids[beyond[0]])
        row = int(np.searchsorted(offsets, beyond[0], side="right"))
        raise UserError(
            f"row {row} of {what} has the token {tokenizer.convert_ids_to_tokens(token)!r} with the id {token}, but "
            f"the backbone's embedding has {embeddings} rows; {_ADVICE}, or take the token out of the rows"
        )


def rows_in_both(train: Examples, held_out: Examples) -> int:
    """How many rows of ``held_out`` read the same as a row of ``train``."""
    sought: dict[bytes, int] = {}
    for row in range(len(held_out)):
        key = _read(held_out, row)
        sought[key] = sought.get(key, 0) + 1
    return sum(sought.pop(_read(train, row), 0) for row in range(len(train)))


def _read(examples: Examples, row: int) -> bytes:
    """What the backbone reads of a row; where there is an encoder, what that reads."""
    side = examples if examples.source is None else examples.source
    return side[row][0].tobytes()
