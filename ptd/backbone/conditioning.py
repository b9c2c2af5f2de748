"""Run text through the backbone for initialisers: keys and values at every layer, and embeddings."""

from __future__ import annotations

import inspect
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptd.backbone.load import embeddings_of
from ptd.types import BackboneShape, Examples, UserError

AT_ONCE = 64
"""Tokens embedded in one forward pass. The pass also computes logits, which are not needed."""
MEASURED = 512
"""Tokens of text from which the size of hidden states is measured, at most the backbone's context."""
CHUNK = 16
"""Tokens per chunk that is drawn from the rows."""
FREQUENT = 5000
"""Size of the set of most frequent tokens to draw from; vocabularies are roughly sorted by frequency."""
DRAWN = 2**16
"""Rows of which text is drawn, if there are more. They stand in random order in memory."""


class Attached(Protocol):
    """The part of `ptd.inject.Attachment` that `TextConditioner` needs."""

    model: PreTrainedModel
    shape: BackboneShape

    def bare(self) -> AbstractContextManager[list[tuple[Tensor, Tensor]]]:
        """Run passes without a prompt; the list gets what each attention layer attends to in these passes."""
        ...


class TextConditioner:
    """Run the backbone without a prompt over text, and return the states of its layers.

    The whole model runs, and its parameters may be partitioned: under ZeRO-3 all ranks have to call `keys_and_values`,
    `embeddings` and `hidden_size` at the same time, with the same arguments.

    Args:
        attached: the backbone, with ptd's attention in place.
        tokenizer: the backbone's tokenizer; None: text cannot be read.
        rows: the training rows, to draw text from; None: `rows` and `chunks` return frequent tokens instead.
        seed: seed of the random draws.
    """

    def __init__(self, attached: Attached, tokenizer: Any, rows: Examples | None = None, seed: int = 0) -> None:
        self.attached, self.model, self.tokenizer = attached, attached.model, tokenizer
        self._examples = rows
        self._random = random.Random(seed)
        self._drawn = self._sides_of_rows()
        self._accepts = inspect.signature(self.model.forward).parameters.keys()
        self._sides = 2 if "decoder_input_ids" in self._accepts else 1

    def rows(self, count: int) -> list[list[int]]:
        """Return ``count`` tokens of training rows, drawn without replacement and concatenated; the last row is whole.

        There is one list per stack: for an encoder-decoder, the encoder's and the decoder's tokens of the same rows.
        """
        return self._collected(count, lambda tokens: tokens)

    def chunks(self, count: int) -> list[list[int]]:
        """Return tokens as `rows` does, but of pieces of `CHUNK` tokens, each from a random place of a row."""

        def piece(tokens: list[int]) -> list[int]:
            begin = self._random.randrange(max(1, len(tokens) - CHUNK + 1))
            return tokens[begin : begin + CHUNK]

        return self._collected(count, piece)

    def frequent(self, count: int) -> list[int]:
        """Return ids of frequent tokens, all different as long as there are enough."""
        vocabulary = range(min(FREQUENT, self.attached.shape.vocab_size))
        ids: list[int] = []
        while len(ids) < count:
            ids += self._random.sample(vocabulary, min(count - len(ids), len(vocabulary)))
        return ids

    def token_ids(self, text: str, *, special: bool = False) -> list[int]:
        """Return the text's token ids, without ``special`` tokens or with those that the tokenizer adds.

        Raises `UserError` without a tokenizer, and for a token that the backbone has no embedding for.
        """
        if self.tokenizer is None:
            raise UserError("method.init: a start from text needs the backbone's tokenizer; pass tokenizer=… as well")
        return self._known(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    @torch.no_grad()
    def keys_and_values(self, sides: Sequence[Sequence[int]]) -> Tensor:
        """Return what attention sees of each of S tokens: flat fp32 ``[S, sum over layers of H·(Dk + Dv)]`` on the CPU.

        Keys are rotated at positions 0…S−1, as a decoder caches them. ``sides``: one list of S token ids per stack; if
        there is only one list, both stacks of an encoder-decoder read it.
        """
        with self.attached.bare() as seen:
            self._run([[ids] for ids in sides], **({"use_cache": False} if "use_cache" in self._accepts else {}))
        return torch.cat([states.flatten(1).float().cpu() for layer in seen for states in layer], dim=1)

    @torch.no_grad()
    def embeddings(self, ids: Sequence[int]) -> Tensor:
        """Return embeddings, fp32 ``[len(ids), embedding size]`` on the CPU, as the embedding layer outputs them.

        They are scaled if the layer scales them. For an encoder-decoder they are the encoder's.
        """
        # Use the encoder's own module if there is one: a shared embedding may never be called (T5's is not).
        encoder = self.model.get_encoder()
        body = encoder if isinstance(encoder, PreTrainedModel) else self.model
        rows: list[Tensor] = []
        for start in range(0, len(ids), AT_ONCE):
            # Each token is its own sequence, so that positions do not matter and no context is too short.
            sequences = [[index] for index in ids[start : start + AT_ONCE]]
            seen: list[Tensor] = []
            # A sharded embedding can be read only while a forward pass has gathered it.
            hook = body.get_input_embeddings().register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(output.flatten(0, -2).float().cpu())
            )
            try:
                with self.attached.bare():
                    self._run([sequences])
            finally:
                hook.remove()
            rows.append(seen[0])
        return torch.cat(rows)

    @torch.no_grad()
    def hidden_size(self) -> float:
        """Return the root mean square of the last hidden states of a text."""
        read = self.rows(min(MEASURED, self.attached.shape.context or MEASURED))
        with self.attached.bare():  # base_model is the whole model if that returns hidden states
            hidden: Tensor = self.model.base_model(**self._inputs([[ids] for ids in read]))[0]
        return float(hidden.float().square().mean().sqrt())

    def _collected(self, count: int, part: Callable[[list[int]], list[int]]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(self._sides)]
        while not all(len(tokens) >= count for tokens in found):
            found = [part(more) + tokens for more, tokens in zip(next(self._drawn), found, strict=True)]
        return [self._known(tokens[len(tokens) - count :]) for tokens in found]

    def _sides_of_rows(self) -> Iterator[list[list[int]]]:
        """Yield the tokens of rows in random order, without end, as one list per stack."""
        examples = self._examples
        if examples is None or not len(examples):
            while True:
                yield [self.frequent(AT_ONCE)] * self._sides
        parts = [side for side in (examples.source, examples) if side is not None]
        empty = 0
        while True:
            some: Sequence[int] = range(len(examples))
            if len(some) > DRAWN:
                some = self._random.sample(some, DRAWN)
            order = array("q", some)
            self._random.shuffle(order)
            for row in order:
                sides = [[token for token in part[row][0].tolist() if token >= 0] for part in parts]
                if all(sides):
                    empty = 0
                    yield sides
                    continue
                empty += 1
                if empty > len(order):  # no row has own tokens
                    yield [self.frequent(AT_ONCE)] * self._sides

    def _inputs(self, sides: Sequence[Sequence[Sequence[int]]]) -> dict[str, Tensor]:
        """Return the model's inputs. ``sides``: for each stack, sequences of equal length.

        The decoder of an encoder-decoder reads the last of the given ``sides``.
        """
        tokens = [torch.tensor([list(ids) for ids in each], device=self.model.device) for each in sides]
        return {"input_ids": tokens[0]} | ({"decoder_input_ids": tokens[-1]} if self._sides == 2 else {})

    def _run(self, sides: Sequence[Sequence[Sequence[int]]], **options: Any) -> None:
        shorter = {"logits_to_keep": 1} if "logits_to_keep" in self._accepts else {}
        self.model(**self._inputs(sides), **options, **shorter)

    def _known(self, ids: Sequence[int]) -> list[int]:
        rows = embeddings_of(self.model)
        beyond = next((token for token in ids if token >= rows), None)
        if beyond is not None:
            raise UserError(
                f"method.init: the text has the token {self.tokenizer.convert_ids_to_tokens(beyond)!r} with the id "
                f"{beyond}, but the backbone's embedding has {rows} rows; give another text, or resize the embedding "
                "(model.resize_token_embeddings(len(tokenizer))) and save model and tokenizer"
            )
        return list(ids)
