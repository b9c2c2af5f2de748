"""Prompt tuning (Lester et al. 2021, https://aclanthology.org/2021.emnlp-main.243): trained embeddings before the text.

The backbone (in an encoder-decoder, the encoder) reads ``[P; X]`` instead of ``X`` (§2), where ``P`` has the shape
``[P, hidden]``. Its initial values (§3.2) matter most for small backbones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ptd.methods import Conditioner, TaskFacts, register
from ptd.methods.settings import (
    INIT_TEXT,
    INIT_TEXT_FILE,
    VIRTUAL_TOKENS,
    check_positive,
    check_start,
    check_text,
    from_nothing,
    initial_text,
    key,
)
from ptd.methods.soft_prompts import EMBEDDINGS, embeddings_of_rows, units_of
from ptd.types import BackboneShape, PromptEncoder, SoftLayout, Units, UserError


@dataclass
class PromptConfig:
    """Keys of ``method:`` for ``name: prompt``."""

    num_virtual_tokens: int = key(16, VIRTUAL_TOKENS)
    init: Literal["rows", "vocabulary", "labels", "text", "random"] = key(
        "rows",
        "the initial values: embeddings of the tokens of training rows (`rows`), or of tokens drawn from the first "
        "5000 of the vocabulary (`vocabulary`); `labels`: the mean embedding of each label's name, then vocabulary; "
        "`text`: the tokens of a text, repeated or truncated; `random`: normal, at the scale of the backbone's "
        "embeddings",
    )
    init_text: str | None = key(None, INIT_TEXT)
    init_text_file: Path | None = key(None, INIT_TEXT_FILE)

    def __post_init__(self) -> None:
        check_positive(self, "num_virtual_tokens")
        check_text(self)


class SoftPromptEncoder(PromptEncoder):
    """An encoder whose parameter is the flat prompt ``[P, hidden]`` itself, in units of the backbone's embeddings."""

    peft_type = "PROMPT_TUNING"

    def __init__(self, units: Units) -> None:
        super().__init__()
        self.layout = SoftLayout(units.origin.shape[1])
        self.embedding = nn.Parameter(torch.zeros_like(units.origin))
        self.units = units

    def network(self) -> Tensor:
        return self.embedding


def check(config: PromptConfig, facts: TaskFacts) -> None:
    """Raise `UserError` for ``{v:n}`` marks, an unreadable text, and ``init: labels`` with no or too many labels."""
    check_start(config, facts)
    if config.init == "labels" and facts.kind not in ("classification", "token_classification"):
        raise UserError(
            f"method.init: labels needs label names, which task.kind {facts.kind} does not have; set method.init: "
            "vocabulary or text"
        )
    if config.init == "labels" and len(facts.labels) > config.num_virtual_tokens:
        raise UserError(
            f"method.init: labels needs one virtual token per label, but method.num_virtual_tokens="
            f"{config.num_virtual_tokens} is fewer than the task's {len(facts.labels)} labels; raise it to at least "
            f"{len(facts.labels)} or set method.init: vocabulary"
        )


@register("prompt", config=PromptConfig, check=check, sizes=from_nothing)
def build(config: PromptConfig, shape: BackboneShape, conditioner: Conditioner, facts: TaskFacts) -> SoftPromptEncoder:
    """Build and initialise the encoder for a backbone of ``shape``; raises `UserError` as `check` does."""
    check(config, facts)
    tokens = config.num_virtual_tokens
    rows = embeddings_of_rows(tokens, conditioner)
    if config.init == "rows":
        origin = rows[:tokens]
    elif config.init == "random":
        origin = torch.zeros_like(rows[:tokens])
    elif config.init == "vocabulary":
        origin = conditioner.embeddings(conditioner.frequent(tokens))
    elif config.init == "labels":
        origin = _labels(tokens, facts.labels, conditioner)
    else:
        origin = conditioner.embeddings(_cycle(tokens, conditioner.token_ids(initial_text(config))))
    encoder = SoftPromptEncoder(units_of(rows, origin))
    if config.init == "random":
        nn.init.normal_(encoder.embedding, std=1 / EMBEDDINGS)
    return encoder


def _cycle(count: int, ids: Sequence[int]) -> list[int]:
    if not ids:
        raise UserError("method.init_text: the text has no tokens; give another text, or set method.init: vocabulary")
    return [ids[index % len(ids)] for index in range(count)]


def _labels(count: int, labels: Sequence[str], conditioner: Conditioner) -> Tensor:
    """Return ``[count, hidden]``: one row per label, the mean over the tokens of its name; then sampled vocabulary."""
    names = [conditioner.token_ids(label) for label in labels]
    for label, name in zip(labels, names, strict=True):
        if not name:
            raise UserError(f"method.init: labels: the label {label!r} has no tokens; set method.init: vocabulary")
    pieces = [*names, *([index] for index in conditioner.frequent(count - len(labels)))]
    rows = conditioner.embeddings([index for piece in pieces for index in piece])
    return torch.stack([block.mean(0) for block in rows.split([len(piece) for piece in pieces])])
