"""Prefix-tuning (Li & Liang 2021, https://aclanthology.org/2021.acl-long.353): trained keys and values at every layer.

On an encoder-decoder the encoder's self-attention, the decoder's and its cross-attention have a prefix each (§4,
``z = [Prefix; x; Prefix′; y]``). `ptd.methods.deep_prompts` holds the maths.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ptd.methods import Conditioner, TaskFacts, register
from ptd.methods.deep_prompts import PrefixEncoder, SeparatePrefixEncoder, prefix_encoder
from ptd.methods.settings import (
    INIT_TEXT,
    INIT_TEXT_FILE,
    PROJECTION,
    TANH_WIDTH,
    VIRTUAL_TOKENS,
    check_positive,
    check_start,
    check_text,
    from_nothing,
    key,
    read_text,
)
from ptd.types import BackboneShape, UserError


@dataclass
class PrefixConfig:
    """Keys of ``method:`` for ``name: prefix``."""

    num_virtual_tokens: int = key(16, VIRTUAL_TOKENS)
    prefix_projection: bool = key(False, PROJECTION)
    encoder_hidden_size: int | None = key(None, TANH_WIDTH)
    embedding_size: int | None = key(
        None,
        "width of the MLP's input, with `prefix_projection`; PEFT's is kv heads × head size; default: the "
        "backbone's hidden size",
    )
    init: Literal["random", "zero", "text"] = key(
        "random",
        "`random` (N(0, 1)), `zero`, or `text`: exactly as a decoder that is conditioned on a text (at least P tokens)",
    )
    init_text: str | None = key(None, INIT_TEXT)
    init_text_file: Path | None = key(None, INIT_TEXT_FILE)
    freeze_first_token: bool = key(False, "keep the first virtual token as it was initialised")

    def __post_init__(self) -> None:
        check_positive(self, "num_virtual_tokens", "encoder_hidden_size", "embedding_size")
        check_text(self)
        if not self.prefix_projection:
            for name in ("encoder_hidden_size", "embedding_size"):
                if getattr(self, name) is not None:
                    raise UserError(f"method.{name}: has no effect without method.prefix_projection: true; remove one")


@register("prefix", config=PrefixConfig, check=check_start, sizes=from_nothing)
def build(
    config: PrefixConfig, shape: BackboneShape, conditioner: Conditioner, facts: TaskFacts
) -> PrefixEncoder | SeparatePrefixEncoder:
    """Build and initialise the encoder for a backbone of ``shape``."""
    projection = config.prefix_projection
    encoder = prefix_encoder(
        shape.layers,
        config.num_virtual_tokens,
        embedding_size=(config.embedding_size or shape.hidden_size) if projection else None,
        encoder_hidden_size=(config.encoder_hidden_size or shape.hidden_size) if projection else None,
        freeze_first_token=config.freeze_first_token,
    )
    if config.init == "zero":
        encoder.fit(torch.zeros_like(encoder()))
    elif config.init == "text":
        _start_from_text(encoder, config, shape, conditioner)
    return encoder


def _start_from_text(
    encoder: PrefixEncoder | SeparatePrefixEncoder, config: PrefixConfig, shape: BackboneShape, conditioner: Conditioner
) -> None:
    if any(layer.kind != "decoder" for layer in shape.layers):
        raise UserError(
            "method.init: text starts from the keys and values that a decoder caches for the text, and this backbone "
            "has an encoder, which caches none; use random or zero, or method.name: prompt with init: text"
        )
    target = conditioner.text_kv(read_text(config), config.num_virtual_tokens)
    if target.shape[1] != encoder.layout.width:
        raise UserError(
            "method.init: text is not possible with this backbone: it caches something else than the keys and "
            "values its attention reads (multi-head latent attention does); use random or zero"
        )
    left = encoder.fit(target)
    if left > 1e-4:
        warnings.warn(
            f"method.encoder_hidden_size={config.encoder_hidden_size or shape.hidden_size} is too small to "
            f"reproduce the text's {config.num_virtual_tokens} keys and values: {left:.1%} relative error is left; "
            f"use at least {config.num_virtual_tokens}",
            stacklevel=2,
        )
