"""Turn a batch into the keyword arguments of a model's forward method."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel

from ptd.inject.attention import packing_arguments
from ptd.inject.stack import Stack
from ptd.types import Batch


def decoder_start(model: PreTrainedModel) -> int | None:
    """Return the decoder's start token of an encoder-decoder, for training and generation; None: no config names it."""
    start: int | None = getattr(model.config, "decoder_start_token_id", None)
    own = getattr(model, "generation_config", None)
    return start if start is not None or own is None else own.decoder_start_token_id


class Inputs:
    """The arguments that a model accepts for a `Batch`.

    ``names``: parameters of the model's forward method; ``takes``: in addition, the parameters of the inner stack that
    the model passes on as ``**kwargs``. ``sees_padding``: the model has bidirectional layers, which need a mask that
    hides padding; under a causal mask no useful token sees padding on the right.
    """

    def __init__(self, model: PreTrainedModel, reader: Stack, *, sees_padding: bool) -> None:
        self.decoder_start = decoder_start(model)
        self.placeholder: int = getattr(model.config, "pad_token_id", None) or 0
        """Placeholder for the decoder's start token in the target sequences of an encoder-decoder."""
        parameters = inspect.signature(model.forward).parameters
        self.names = set(parameters)
        self.takes = set(parameters)
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            self.takes |= set(reader.parameters)
        self.sees_padding = sees_padding

    def of(self, batch: Batch, first_position: int) -> dict[str, Any]:
        """Return the arguments for ``batch``. ``first_position``: first position that the backbone itself uses."""
        inputs: dict[str, Any] = {}
        if "use_cache" in self.takes:
            inputs["use_cache"] = False
        if batch.source is not None:
            ids = batch.input_ids.clone()
            # The model's start token applies unless the target has its own (mBART's language code).
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
