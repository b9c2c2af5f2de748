"""A batch as the keyword arguments that a model of its kind takes."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel

from ptd.inject.attention import packing_arguments
from ptd.inject.stack import Stack
from ptd.types import Batch


def decoder_start(model: PreTrainedModel) -> int | None:
    """What the decoder of an encoder-decoder starts from, in training and in generation; None: nothing says it."""
    start: int | None = getattr(model.config, "decoder_start_token_id", None)
    own = getattr(model, "generation_config", None)
    return start if start is not None or own is None else own.decoder_start_token_id


class Inputs:
    """What a model takes of a `Batch`, and under which names.

    ``names``: its own parameters; ``takes``: also those that a shell hands on to the stack inside without naming them.
    ``sees_padding``: it has layers that look both ways, which padding has to be hidden from; behind a causal mask no
    useful token sees what pads on the right.
    """

    def __init__(self, model: PreTrainedModel, reader: Stack, *, sees_padding: bool) -> None:
        self.decoder_start = decoder_start(model)
        self.placeholder: int = getattr(model.config, "pad_token_id", None) or 0
        """The token that the sequences of an encoder-decoder have where their decoder starts."""
        parameters = inspect.signature(model.forward).parameters
        self.names = set(parameters)
        self.takes = set(parameters)
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            self.takes |= set(reader.parameters)
        self.sees_padding = sees_padding

    def of(self, batch: Batch, first_position: int) -> dict[str, Any]:
        """``first_position``: what the backbone's own positions start from."""
        inputs: dict[str, Any] = {}
        if "use_cache" in self.takes:
            inputs["use_cache"] = False
        if batch.source is not None:
            ids = batch.input_ids.clone()
            # Where the target does not say what the decoder starts from (mBART's language code), the model does.
            if self.decoder_start is not None:
                ids[:, 0] = ids[:, 0].masked_fill(ids[:, 0] == self.placeholder, self.decoder_start)
            source = batch.source
            return inputs | {
                "input_ids": source.input_ids,
                "attention_mask": source.attention_mask.long(),
                "decoder_input_ids": ids,
            }
        inputs["input_ids"] = batch.input_ids
        if "position_ids" in self.takes:
            inputs["position_ids"] = batch.position_ids + first_position
        if batch.token_type_ids is not None and "token_type_ids" in self.takes:
            inputs["token_type_ids"] = batch.token_type_ids
        if batch.cu_seqlens is not None:
            inputs |= packing_arguments(batch.cu_seqlens, batch.max_seqlen)
        elif self.sees_padding:
            inputs["attention_mask"] = batch.attention_mask.long()
        return inputs
