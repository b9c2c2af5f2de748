"""Attention with a prefix by the textbook formula, registered under its own name in transformers' AttentionInterface.

A family calls it wherever it calls its attention, with the mask that "eager" attention gets.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "plain_with_prefix"


@dataclass
class Pass:
    """One forward pass: the prefix of each layer in the order of the calls, and the shapes and modules of the calls."""

    prefix: list[tuple[Tensor, Tensor]] | None = None
    shapes: list[tuple[int, int, int]] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)


running: ContextVar[Pass] = ContextVar("sheet_pass")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return softmax(q·[Kp; K]ᵀ·scale + [0; mask]) [Vp; V], where the layer's prefix Kp, Vp is never masked."""
    now = running.get()
    number = len(now.shapes)
    now.shapes.append((key.shape[1], key.shape[3], value.shape[3]))
    now.modules.append(module)
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def score(keys: Tensor) -> Tensor:
        scores = query @ keys.repeat_interleave(group, 1).transpose(2, 3) * scale
        return scores if softcap is None else softcap * torch.tanh(scores / softcap)

    scores = score(key)
    if position_bias is not None:
        scores = scores + position_bias[..., : key.shape[2]]
    if attention_mask is not None:
        visible = attention_mask[..., : key.shape[2]]
        scores = scores.masked_fill(~visible, -torch.inf) if visible.dtype == torch.bool else scores + visible
    value = value.repeat_interleave(group, 1)
    if now.prefix is not None:
        keys, values = (part.transpose(0, 1)[None] for part in now.prefix[number])
        scores = torch.cat([score(keys).expand(len(scores), -1, -1, -1), scores], dim=-1)
        value = torch.cat([values.repeat_interleave(group, 1).expand(len(value), -1, -1, -1), value], dim=2)
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)
