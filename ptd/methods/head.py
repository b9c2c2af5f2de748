"""Head tuning, the classical baseline: the backbone is frozen, and a head on its last hidden states is trained.

This is the feature-based use of a pretrained encoder (Devlin et al. 2019, §5.3, https://aclanthology.org/N19-1423). The
head is linear, or an MLP with tanh layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ptd.methods import Conditioner, NoPromptEncoder, TaskFacts, register
from ptd.methods.settings import POOLING, key, need_trained_head
from ptd.types import BackboneShape, HeadSettings, UserError


@dataclass
class HeadConfig:
    """Keys of ``method:`` for ``name: head``."""

    pooling: Literal["auto", "cls", "mean", "last"] = key("auto", POOLING)
    hidden_sizes: list[int] = key(list, "widths of the tanh layers before the output; empty: a linear head")

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.hidden_sizes):
            raise UserError(f"method.hidden_sizes: got {self.hidden_sizes}, but each has to be at least 1")


def head(config: HeadConfig) -> HeadSettings:
    """Return the settings of the trained head."""
    return HeadSettings(config.pooling, tuple(config.hidden_sizes))


def check(config: HeadConfig, facts: TaskFacts) -> None:
    """Raise `UserError` unless the task has a trained head."""
    need_trained_head("head", config.pooling, facts, for_words="hard_prompt", for_text="prefix")


@register("head", config=HeadConfig, head=head, check=check, has_prompt=False)
def build(config: HeadConfig, shape: BackboneShape, conditioner: Conditioner, facts: TaskFacts) -> NoPromptEncoder:
    """Return an encoder without a prompt: the run trains only the task's readout."""
    return NoPromptEncoder()
