"""What the backbone makes of real text, where initialisers start from: its cached keys and values, its embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ptd.backbone.load import embeddings_of
from ptd.types import UserError

CHUNK = 64
"""Tokens embedded in one forward pass: the pass also computes logits, of which none are needed."""


class TextConditioner:
    """Runs the plain backbone (no prompt set) over a text and returns its cache or its input embeddings.

    It calls the whole model, whose parameters may be partitioned: under ZeRO-3 every rank has to call `text_kv` and
    `embeddings` together, with the same arguments.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, device: torch.device) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self._accepts = inspect.signature(model.forward).parameters.keys()

    @torch.no_grad()
    def text_kv(self, text: str, num_virtual_tokens: int) -> Tensor:
        """Flat fp32 ``[P, sum over layers of H*(Dk+Dv)]`` on the CPU; keys stand as cached, rotated at 0…P−1.

        For decoders. Raises `UserError` if the text has fewer than P tokens.
        """
        ids = self._known(self._needed_tokenizer()(text)["input_ids"])
        if len(ids) < num_virtual_tokens:
            raise UserError(
                f"method.init_text: the text has {len(ids)} tokens, fewer than method.num_virtual_tokens="
                f"{num_virtual_tokens}; give a longer text or set num_virtual_tokens to at most {len(ids)}"
            )
        tokens = torch.tensor([ids[:num_virtual_tokens]], device=self.device)
        cache = DynamicCache()  # without a config: no layer drops what lies outside its window
        self._run(tokens, past_key_values=cache, use_cache=True)
        blocks = [
            states[0].transpose(0, 1).reshape(num_virtual_tokens, -1)
            for layer in cache.layers
            for states in (layer.keys, layer.values)
        ]
        return torch.cat(blocks, dim=1).float().cpu()

    def token_ids(self, text: str) -> list[int]:
        """The text's token ids, without special tokens.

        Raises `UserError` without a tokenizer, and for a token that the backbone has no embedding for.
        """
        return self._known(self._needed_tokenizer()(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def embeddings(self, ids: Sequence[int]) -> Tensor:
        """fp32 ``[len(ids), embedding size]`` on the CPU, as the embedding layer puts them out (scaled, if it scales).

        Of an encoder-decoder: the encoder's.
        """
        # The encoder's own module, where there is one: what an encoder-decoder shares need not be called (T5's is not).
        encoder = self.model.get_encoder()
        body = encoder if isinstance(encoder, PreTrainedModel) else self.model
        rows: list[Tensor] = []
        for start in range(0, len(ids), CHUNK):
            # A sequence each, so that positions do not matter and no context is too short.
            tokens = torch.tensor(ids[start : start + CHUNK], device=self.device)[:, None]
            seen: list[Tensor] = []
            # A sharded embedding can be read only while a forward pass has gathered it.
            hook = body.get_input_embeddings().register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(output[:, 0].float().cpu())
            )
            try:
                self._run(tokens, **({"decoder_input_ids": tokens} if "decoder_input_ids" in self._accepts else {}))
            finally:
                hook.remove()
            rows.append(seen[0])
        return torch.cat(rows)

    def _run(self, tokens: Tensor, **options: Any) -> None:
        shorter = {"logits_to_keep": 1} if "logits_to_keep" in self._accepts else {}
        self.model(input_ids=tokens, **options, **shorter)

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

    def _needed_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UserError("method.init: a start from words needs the backbone's tokenizer; pass tokenizer=… as well")
        return self.tokenizer
