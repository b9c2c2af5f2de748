"""P-tuning v2 (Liu et al. 2022, https://aclanthology.org/2022.acl-short.8): deep prompts and a trained linear head.

The method trains keys and values at every layer (§3.2), directly or through an MLP ("Reparameterization", §3.3), and a
linear classifier on the last hidden states in place of a verbalizer ("Classification Head"). It suits classification,
tagging and extractive question answering. `ptd.methods.deep_prompts` holds the maths of the prompts.
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
    POOLING,
    PROJECTION,
    TANH_WIDTH,
    VIRTUAL_TOKENS,
    check_positive,
    check_start_text,
    check_text,
    from_nothing,
    key,
    need_trained_head,
)
from ptd.types import BackboneShape, HeadSettings, UserError


@dataclass
class PTuningV2Config:
    """Keys of ``method:`` for ``name: p_tuning_v2``."""

    num_virtual_tokens: int = key(16, VIRTUAL_TOKENS)
    prefix_projection: bool = key(False, PROJECTION)
    encoder_hidden_size: int | None = key(None, TANH_WIDTH)
    pooling: Literal["auto", "cls", "mean", "last"] = key("auto", POOLING)
    init: Literal["rows", "chunks", "text", "random", "zero"] = key("rows", DEEP_START)
    init_text: str | None = key(None, INIT_TEXT)
    init_text_file: Path | None = key(None, INIT_TEXT_FILE)

    def __post_init__(self) -> None:
        check_positive(self, "num_virtual_tokens", "encoder_hidden_size")
        check_text(self)
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise UserError(
                "method.encoder_hidden_size: has no effect without method.prefix_projection: true; set both or neither"
            )


def head(config: PTuningV2Config) -> HeadSettings:
    """Return the settings of the linear classifier."""
    return HeadSettings(config.pooling)


def check(config: PTuningV2Config, facts: TaskFacts) -> None:
    """Raise `UserError` unless the task has a trained head and the text to start from can be read."""
    need_trained_head("p_tuning_v2", config.pooling, facts, for_words="prefix", for_text="prefix")
    check_start_text(config)


@register("p_tuning_v2", config=PTuningV2Config, head=head, check=check, sizes=from_nothing)
def build(
    config: PTuningV2Config, shape: BackboneShape, conditioner: Conditioner, facts: TaskFacts
) -> PrefixEncoder | SeparatePrefixEncoder:
    """Build and initialise the encoder for a backbone of ``shape``; raises `UserError` as `started` does."""
    projection = config.prefix_projection
    encoder = prefix_encoder(
        shape.prefix_layers(),
        config.num_virtual_tokens,
        embedding_size=shape.hidden_size if projection else None,
        encoder_hidden_size=(config.encoder_hidden_size or shape.hidden_size) if projection else None,
    )
    return started(encoder, config, shape, conditioner)
