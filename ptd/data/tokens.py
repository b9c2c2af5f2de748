"""Check tokenised rows: ids for which the backbone has no embedding, and held-out rows that are training rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptd.types import Examples, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ADVICE = (
    "the token was added to the tokenizer, but not to the model: resize the embedding "
    "(model.resize_token_embeddings(len(tokenizer))) and save the model and the tokenizer"
)


def check_special(tokenizer: PreTrainedTokenizerBase, embeddings: int | None) -> None:
    """Raise `UserError` if the padding token, which padded batches contain, is not among the ``embeddings`` rows."""
    pad = tokenizer.pad_token_id
    if embeddings is not None and pad is not None and pad >= embeddings:
        raise UserError(
            f"backbone.path: the tokenizer's padding token {tokenizer.pad_token!r} has the id {pad}, but the backbone's"
            f" embedding has {embeddings} rows; {_ADVICE}, or set pad_token in tokenizer_config.json to a token that "
            "the backbone has"
        )


def check_ids(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, embeddings: int | None, what: str, *, writes: bool
) -> None:
    """Raise `UserError` if a token id has no row in the backbone's embedding; the error names the row of ``what``.

    ``embeddings``: number of rows of the embedding; None: unknown, so nothing is checked. ``writes``: the labels are
    token ids and are checked as well.
    """
    if embeddings is None:
        return
    check_special(tokenizer, embeddings)
    for side in (examples, examples.source):
        if side is None:
            continue
        found = side.summary
        for ids, highest in ((side.tokens, found.highest_token), (side.labels, found.highest_label if writes else -1)):
            if highest >= embeddings:
                _check(ids, side.offsets[:: side.group], tokenizer, embeddings, what)


def check_words(ids: list[int], tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """Raise `UserError` if a token of ``task.verbalizer`` has no row in the backbone's embedding."""
    beyond = next((token for token in ids if token >= embeddings), None)
    if beyond is not None:
        raise UserError(
            f"task.verbalizer: a word has the token {tokenizer.convert_ids_to_tokens(beyond)!r} with the id {beyond}, "
            f"but the backbone's embedding has {embeddings} rows; {_ADVICE}, or give another word"
        )


def check_prompts(prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, embeddings: int, what: str) -> None:
    """Raise `UserError` if a token of a prompt has no row in the backbone's embedding.

    The error calls the prompts row 1, 2, … of ``what``. The tokenizer's padding token is not checked, because
    generation does not need it.
    """
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
            f"the backbone's embedding has {embeddings} rows; {_ADVICE}, or remove the token from the rows"
        )


def rows_in_both(train: Examples, held_out: Examples) -> int:
    """Return how many rows of ``held_out`` have the same input tokens (see `_read`) as a row of ``train``."""
    sought: dict[bytes, int] = {}
    for row in range(len(held_out)):
        key = _read(held_out, row)
        sought[key] = sought.get(key, 0) + 1
    return sum(sought.pop(_read(train, row), 0) for row in range(len(train)))


def _read(examples: Examples, row: int) -> bytes:
    """Return the tokens that the backbone reads for a row; for an encoder-decoder, those that the encoder reads."""
    side = examples if examples.source is None else examples.source
    return side[row][0].tobytes()
