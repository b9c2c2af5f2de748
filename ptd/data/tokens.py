"""Check tokenised rows: ids for which the backbone has no embedding, and held-out rows that are training rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ptd.types import BLOCK, Examples, UserError

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
    for begin in range(0, len(ids), BLOCK):
        beyond = np.flatnonzero(ids[begin : begin + BLOCK] >= embeddings)
        if len(beyond):
            place = begin + int(beyond[0])
            token, row = int(ids[place]), int(np.searchsorted(offsets, place, side="right"))
            raise UserError(
                f"row {row} of {what} has the token {tokenizer.convert_ids_to_tokens(token)!r} with the id {token}, "
                f"but the backbone's embedding has {embeddings} rows; {_ADVICE}, or remove the token from the rows"
            )


def rows_in_both(train: Examples, held_out: Examples) -> int:
    """Return how many rows of ``held_out`` have the same input tokens as a row of ``train``.

    The input tokens are those that the backbone reads; for an encoder-decoder, those that the encoder reads. Rows with
    equal hashes are compared token by token. In memory are 17 bytes per row of ``held_out``, and nothing per other row.
    """
    train, held_out = (side if side.source is None else side.source for side in (train, held_out))
    factors = np.random.PCG64(0).random_raw(max(train.longest, held_out.longest))
    hashes = np.concatenate([some for _, some in _hashes(held_out, factors)])
    by_hash = np.argsort(hashes)
    hashes = hashes[by_hash]
    found = np.zeros(len(hashes), dtype=np.bool_)  # by place in ``by_hash``
    for first, some in _hashes(train, factors):
        places = np.searchsorted(hashes, some).clip(max=len(hashes) - 1)
        for alike in np.flatnonzero((hashes[places] == some) & ~found[places]):
            tokens, place = train[first + int(alike)][0], int(places[alike])
            while place < len(hashes) and hashes[place] == some[alike]:
                found[place] |= np.array_equal(tokens, held_out[int(by_hash[place])][0])
                place += 1
    return int(found.sum())


def _hashes(examples: Examples, factors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a hash of the tokens of each row, uint64, for consecutive rows, after the number of the first row.

    A hash is the sum of the tokens, each multiplied by the factor of its place, modulo 2^64. ``factors``: uint64, at
    least as many as the longest row has tokens.
    """
    for first, stop in examples.blocks():
        bounds = examples.offsets[first * examples.group : stop * examples.group + 1 : examples.group]
        begins = bounds[:-1] - bounds[0]
        places = np.arange(bounds[-1] - bounds[0]) - np.repeat(begins, np.diff(bounds))
        tokens = examples.tokens[bounds[0] : bounds[-1]].astype(np.uint64) + np.uint64(1)
        yield first, np.add.reduceat(tokens * factors[places], begins)
