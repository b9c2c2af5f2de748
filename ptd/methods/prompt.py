"""Prompt tuning (Lester et al. 2021, https://aclanthology.org/2021.emnlp-main.243): trained input embeddings in front.

The backbone (of an encoder-decoder the encoder) reads ``[P; X]`` instead of ``X`` (§2). How the rows of ``P``, which is
``[P, hidden]``, start (§3.2) matters most for small backbones.
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
    key,
    read_text,
)
from ptd.types import BackboneShape, PromptEncoder, SoftLayout, UserError

FREQUENT = 5000
"""Of how many of the most frequent tokens a start is drawn (§3.2); vocabularies are about sorted by frequency."""


@dataclass
class PromptConfig:
    """Keys of ``method:`` for ``name: prompt``.

    ``init``: ``random`` is uniform in [-0.5, 0.5]; ``vocabulary`` takes the embeddings of frequent tokens; ``labels``
    those of the task's label names, the rest as ``vocabulary``; ``text`` those of a text, repeated or cut to length.
    """

    num_virtual_tokens: int = key(16, VIRTUAL_TOKENS)
    init: Literal["random", "vocabulary", "labels", "text"] = key(
        "vocabulary",
        "the start: embeddings of tokens drawn from the first 5000 of the `vocabulary`; `labels`: the mean embedding "
        "of each label's name, then vocabulary; `text`: the tokens of a text, repeated or cut; `random`: uniform in "
        "[−0.5, 0.5]",
    )
    init_text: str | None = key(None, INIT_TEXT)
    init_text_file: Path | None = key(None, INIT_TEXT_FILE)

    def __post_init__(self) -> None:
        check_positive(self, "num_virtual_tokens")
        check_text(self)


class SoftPromptEncoder(PromptEncoder):
    """The flat prompt is the parameter ``[P, hidden]``."""

    peft_type = "PROMPT_TUNING"

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.layout = SoftLayout(embedding.shape[1])
        self.embedding = nn.Parameter(embedding)

    def forward(self) -> Tensor:
        return self.embedding


def check(config: PromptConfig, facts: TaskFacts) -> None:
    """Refuse marks, a text that cannot be read, and to start from label names where there are none, or too many."""
    check_start(config, facts)
    if config.init == "labels" and facts.kind not in ("classification", "token_classification"):
        raise UserError(
            f"method.init: labels needs label names, which task.kind {facts.kind} does not have; set method.init: "
            "vocabulary or text"
        )
    if config.init == "labels" and len(facts.labels) > config.num_virtual_tokens:
        raise UserError(
            f"method.init: labels needs a virtual token a label, but method.num_virtual_tokens="
            f"{config.num_virtual_tokens} is fewer than the task's {len(facts.labels)} labels; raise it to at least "
            f"{len(facts.labels)} or set method.init: vocabulary"
        )


@register("prompt", config=PromptConfig, check=check, sizes=from_nothing)
def build(config: PromptConfig, shape: BackboneShape, conditioner: Conditioner, facts: TaskFacts) -> SoftPromptEncoder:
    """Build and initialise the encoder for a backbone of ``shape``; raises `UserError` as `check` does."""
    check(config, facts)
    tokens = config.num_virtual_tokens
    if config.init == "random":
        return SoftPromptEncoder(torch.rand(tokens, shape.input_size) - 0.5)
    if config.init == "vocabulary":
        start = conditioner.embeddings(_sample(tokens, shape.vocab_size))
    elif config.init == "labels":
        start = _labels(tokens, facts.labels, shape.vocab_size, conditioner)
    else:
        start = conditioner.embeddings(_cycle(tokens, conditioner.token_ids(read_text(config))))
    return SoftPromptEncoder(start)


def _sample(count: int, vocab_size: int) -> list[int]:
    """Ids of frequent tokens, all different as long as there are enough."""
    frequent = min(FREQUENT, vocab_size)
    ids: list[int] = []
    while len(ids) < count:
        ids += torch.randperm(frequent)[: count - len(ids)].tolist()
    return ids


def _cycle(count: int, ids: Sequence[int]) -> list[int]:
    if not ids:
        raise UserError("method.init_text: the text has no tokens; give one that does, or set method.init: vocabulary")
    return [ids[index % len(ids)] for index in range(count)]


def _labels(count: int, labels: Sequence[str], vocab_size: int, conditioner: Conditioner) -> Tensor:
    """A row a label, the mean over the tokens of its name; then sampled vocabulary, ``[count, hidden]``."""
    names = [conditioner.token_ids(label) for label in labels]
    for label, name in zip(labels, names, strict=True):
        if not name:
            raise UserError(f"method.init: labels: the label {label!r} has no tokens; set method.init: vocabulary")
    pieces = [*names, *([index] for index in _sample(count - len(labels), vocab_size))]
    rows = conditioner.embeddings([index for piece in pieces for index in piece])
    return torch.stack([block.mean(0) for block in rows.split([len(piece) for piece in pieces])])
