"""The nouns that travel between the stages of ptd (see the data flow in README.md).

Shape legend used everywhere: P virtual tokens, L layers, H key/value heads, D head size, B sequences,
S tokens of a sequence, N tokens of a packed row, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

IGNORE_INDEX = -100
"""Label of a position that carries no loss (the value Hugging Face and torch use)."""


class UserError(Exception):
    """Something the user gave cannot work. The message says what was given, why it cannot work and what to do.

    The command line prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


@dataclass(frozen=True)
class LayerShape:
    """Key/value geometry of one attention layer."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def numel(self) -> int:
        """Numbers one virtual token needs in this layer: its key and its value."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class BackboneShape:
    """All a method may know of the backbone: plain sizes, no transformers object."""

    model_type: str
    hidden_size: int
    vocab_size: int
    context: int | None
    layers: tuple[LayerShape, ...]


@dataclass(frozen=True)
class PrefixKV:
    """Keys and values that every query of a layer attends to beside its own tokens.

    ``keys[l]`` is ``[P, H, Dk]`` and ``values[l]`` ``[P, H, Dv]`` for layer ``l``; sizes may differ between layers.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def from_flat(cls, flat: Tensor, layers: tuple[LayerShape, ...]) -> PrefixKV:
        """Views of a flat prefix ``[P, W]``: columns layer-major, keys before values, then kv head, then head dim."""
        shapes = [(layer.kv_heads, dim) for layer in layers for dim in (layer.key_dim, layer.value_dim)]
        # One split for all layers: its backward joins the gradients once, where a slice a layer would
        # allocate and add a full-size gradient each.
        blocks = flat.split([heads * dim for heads, dim in shapes], dim=1)
        views = [block.unflatten(1, shape) for block, shape in zip(blocks, shapes, strict=True)]
        return cls(tuple(views[0::2]), tuple(views[1::2]))

    @property
    def num_virtual_tokens(self) -> int:
        return self.keys[0].shape[0]

    def tensors(self) -> Iterator[Tensor]:
        yield from self.keys
        yield from self.values


PromptState = PrefixKV
"""What a prompt encoder hands to the injection. Injection dispatches on its type, the engine on nothing."""


class PromptEncoder(nn.Module):
    """The trained module: no input, one flat output. A method's encoder derives from this interface.

    ``forward() -> Tensor`` gives the flat prompt: the only tensor whose gradient is reduced over ranks.
    """

    def state(self, flat: Tensor) -> PromptState:
        """View a tensor of the flat prompt's shape as a `PromptState`.

        It copies nothing, so the views of a gradient buffer are the gradients of the views.
        """
        raise NotImplementedError

    def tensor_parallel_plan(self) -> Mapping[str, Any]:
        """Module name -> `torch.distributed.tensor.parallel` style for the wide layers; empty: all replicated."""
        return {}


class Reporter:
    """Where long work tells how far it is. This one is silent; the command line brings one that prints."""

    def note(self, text: str) -> None:
        """A line worth reading."""

    def start(self, task: str, total: int, done: int = 0) -> None:
        """A task of ``total`` steps begins, ``done`` of which lie behind it already."""

    def advance(self, task: str, done: int, line: str | None = None) -> None:
        """``done`` steps of the task are behind; ``line`` says how it stands, when there is something to say."""

    def finish(self, task: str) -> None:
        """The task is over."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Padded: ``input_ids``, ``labels`` and ``position_ids`` are ``[B, S]``, padded on the right.
    Packed: they are ``[1, N]``, sequences one behind the other; ``cu_seqlens`` (int32, ``[sequences + 1]``) holds their
    boundaries and ``position_ids`` restart at 0 in each.
    ``labels[:, t]`` is the token to predict *from* position ``t`` (already shifted), `IGNORE_INDEX` where none
    is due.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    tokens: int
    supervised_tokens: int

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        moved = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return Batch(**{**vars(self), **moved})


@dataclass(frozen=True)
class DataReport:
    """What tokenising did to the rows, so that it can be told: counts of rows, tokens and cuts."""

    rows: int
    tokens: int
    supervised_tokens: int
    prompts_cut: int
    completions_cut: int

    def __str__(self) -> str:
        line = f"{self.rows:,} rows, {self.tokens:,} tokens, {self.supervised_tokens:,} of them supervised"
        for count, side, name in (
            (self.prompts_cut, "left", "prompts"),
            (self.completions_cut, "right", "completions"),
        ):
            if count:
                line += f"; {count:,} {name} cut on the {side} to max_length"
        return line


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokenised rows, one behind the other; row ``i`` lies at ``offsets[i]:offsets[i + 1]`` and has at least one token.

    ``tokens`` int32 ``[N]``; ``supervised`` bool ``[N]``: whether the token is to be predicted (never the first of a
    row, nothing stands before it); ``offsets`` int64 ``[rows + 1]``.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray
    report: DataReport

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of the row's tokens and supervision, each ``[length]``."""
        row = range(len(self))[row]
        piece = slice(self.offsets[row], self.offsets[row + 1])
        return self.tokens[piece], self.supervised[piece]

    def digest(self) -> str:
        """A short identity of the content: the same rows tokenised the same way, and nothing else, give the same."""
        content = hashlib.sha256()
        for array in (self.tokens, self.supervised, self.offsets):
            content.update(array.tobytes())
        return content.hexdigest()[:16]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 ``[rows]``."""
        return np.diff(self.offsets)
