"""Prefix-tuning (Li & Liang 2021, https://aclanthology.org/2021.acl-long.353): trained keys and values at every layer.

In an encoder-decoder, the encoder's self-attention, the decoder's self-attention and the cross-attention each have a
prefix (§4, ``z = [Prefix; x; Prefix′; y]``). `ptd.methods.deep_prompts` holds the maths.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ptd.methods import Conditioner, TaskFacts, register
from ptd.methods.deep_prompts import PrefixEncoder, SeparatePrefixEncoder, prefix_encoder, started
from ptd.methods.settings import (
    DEEP_START,
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
        "width of the MLP's input, with `prefix_projection`; PEFT uses kv heads × head size; default: the "
        "backbone's hidden size",
    )
    init: Literal["rows", "chunks", "text", "random", "zero"] = key("rows", DEEP_START)
    init_text: str | None = key(None, INIT_TEXT)
    init_text_file: Path | None = key(None, INIT_TEXT_FILE)
    freeze_first_token: bool = key(False, "do not train the first virtual token: it keeps its initial values")

    def __post_init__(self) -> None:
        check_positive(self, "num_virtual_tokens", "encoder_hidden_size", "embedding_size")
        check_text(self)
        if not self.prefix_projection:
            for name in ("encoder_hidden_size", "embedding_size"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"method.{name}: has no effect without method.prefix_projection: true; set both or neither"
                    )


@register("prefix", config=PrefixConfig, check=check_start, sizes=from_nothing)
def build(
    config: PrefixConfig, shape: BackboneShape, conditioner: Conditioner, facts: TaskFacts
) -> PrefixEncoder | SeparatePrefixEncoder:
    """Build and initialise the encoder for a backbone of ``shape``; raises `UserError` as `started` does."""
    projection = config.prefix_projection
    encoder = prefix_encoder(
        shape.prefix_layers(),
        config.num_virtual_tokens,
        embedding_size=(config.embedding_size or shape.hidden_size) if projection else None,
        encoder_hidden_size=(config.encoder_hidden_size or shape.hidden_size) if projection else None,
    )
    started(encoder, config, shape, conditioner)
    if config.freeze_first_token:
        encoder.freeze_first_token()
    return encoder
