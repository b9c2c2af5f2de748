"""The nouns that travel between the stages of ptd (see the data flow in README.md).

Shape legend used everywhere: P virtual tokens, L attention layers, H key/value heads, D head size, B sequences,
S tokens of a sequence, N tokens of a packed row, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ptd.errors import Preempted as Preempted
from ptd.errors import RankError as RankError
from ptd.errors import UserError as UserError
from ptd.transfer import to_device

IGNORE_INDEX = -100
"""Label of a position that carries no loss (the value Hugging Face and torch use)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What the weights of a backbone may be, by the names of ``backbone.dtype``."""


Architecture = Literal["decoder", "encoder", "encoder-decoder"]
"""What kind of transformer a backbone is."""

Output = Literal["causal_lm", "masked_lm", "seq2seq_lm", "body"]
"""What a backbone ends in: a language model's logits, or its last hidden states."""

AttentionKind = Literal["decoder", "encoder", "cross"]
"""Where an attention layer sits: in a decoder (causal), in an encoder, or from a decoder to an encoder's output."""


@dataclass(frozen=True)
class LayerShape:
    """Key/value geometry of one attention layer."""

    kv_heads: int
    key_dim: int
    value_dim: int
    kind: AttentionKind = "decoder"

    @property
    def numel(self) -> int:
        """Numbers one virtual token needs in this layer: its key and its value."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class BackboneShape:
    """All a method may know of the backbone: plain sizes, no transformers object.

    ``layers`` are its attention layers in the order in which a forward pass calls them.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    context: int | None
    layers: tuple[LayerShape, ...]
    embedding_size: int | None = None

    @property
    def input_size(self) -> int:
        """Width of the input embeddings: the hidden size, but for families that project them (OPT-350m)."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size


@dataclass(frozen=True)
class PrefixKV:
    """Keys and values that every query of a layer attends to beside its own tokens.

    ``keys[l]`` is ``[P, H, Dk]`` and ``values[l]`` ``[P, H, Dv]`` for layer ``l``; sizes may differ between layers.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def num_virtual_tokens(self) -> int:
        return self.keys[0].shape[0]

    def tensors(self) -> Iterator[Tensor]:
        yield from self.keys
        yield from self.values


@dataclass(frozen=True)
class SoftTokens:
    """Input embeddings ``[P, hidden]`` of virtual tokens.

    ``in_front``: they stand before every sequence (of an encoder-decoder: of the encoder's). Otherwise the sequences
    themselves hold them: token id ``virtual_id(i)`` stands for row ``i``.
    """

    embeddings: Tensor
    in_front: bool

    @property
    def num_virtual_tokens(self) -> int:
        return self.embeddings.shape[0]

    def tensors(self) -> Iterator[Tensor]:
        yield self.embeddings


@dataclass(frozen=True)
class NoPrompt:
    """Nothing is put beside the tokens."""

    num_virtual_tokens = 0

    def tensors(self) -> Iterator[Tensor]:
        yield from ()


PromptState = PrefixKV | SoftTokens | NoPrompt
"""What a prompt encoder hands to the injection. Injection dispatches on its type, the engine on nothing."""


def virtual_id(index: int) -> int:
    """The token id that stands for virtual token ``index`` in a sequence: negative, so no vocabulary has it."""
    return -1 - index


class PromptLayout(Protocol):
    """How a flat prompt is read: the part of an encoder that an adapter keeps."""

    def state(self, flat: Tensor) -> PromptState:
        """View a tensor of the flat prompt's shape as a `PromptState`.

        It copies nothing, so the views of a gradient buffer are the gradients of the views.
        """
        ...


@dataclass(frozen=True)
class PrefixLayout:
    """Flat ``[P, W]``: columns layer-major, keys before values, then kv head, then head dim."""

    layers: tuple[LayerShape, ...]

    @property
    def width(self) -> int:
        return sum(layer.numel for layer in self.layers)

    def state(self, flat: Tensor) -> PrefixKV:
        shapes = [(layer.kv_heads, dim) for layer in self.layers for dim in (layer.key_dim, layer.value_dim)]
        # One split for all layers: its backward joins the gradients once, where a slice a layer would
        # allocate and add a full-size gradient each.
        blocks = flat.split([heads * dim for heads, dim in shapes], dim=1)
        views = [block.unflatten(1, shape) for block, shape in zip(blocks, shapes, strict=True)]
        return PrefixKV(tuple(views[0::2]), tuple(views[1::2]))


@dataclass(frozen=True)
class SoftLayout:
    """Flat ``[P, hidden]``: the embeddings themselves."""

    hidden_size: int
    in_front: bool = True

    @property
    def width(self) -> int:
        return self.hidden_size

    def state(self, flat: Tensor) -> SoftTokens:
        return SoftTokens(flat, self.in_front)


@dataclass(frozen=True)
class EmptyLayout:
    """Flat ``[0, 0]``."""

    width = 0

    def state(self, flat: Tensor) -> NoPrompt:
        return NoPrompt()


class Units(nn.Module):
    """The backbone's own sizes, in which a prompt is trained: ``flat = origin + unit · z``, where ``z`` is trained.

    AdamW moves every number by up to the learning rate per step, whatever the number's size. So a learning rate means
    the same for every backbone only if it moves ``z`` ``[P, W]``: ``unit`` ``[W]`` is the root mean square that the
    backbone's own keys, values or embeddings have there, ``origin`` ``[P, W]`` the prompt at ``z = 0``. Both are fixed.
    """

    def __init__(self, origin: Tensor, unit: Tensor) -> None:
        super().__init__()
        self.origin: Tensor
        self.unit: Tensor
        self.register_buffer("origin", origin)
        self.register_buffer("unit", unit)

    def forward(self, z: Tensor) -> Tensor:
        return torch.addcmul(self.origin, self.unit, z)


class PromptEncoder(nn.Module):
    """The trained module: no input, one flat output. A method's encoder derives from this interface.

    ``forward() -> Tensor`` gives the flat prompt: the only tensor whose gradient is reduced over ranks. A subclass
    defines `network`, whose output is the flat prompt in ``units``; None: it is the flat prompt itself, which is what
    runs trained before there were units.
    """

    layout: PrefixLayout | SoftLayout | EmptyLayout
    peft_type: str | None = None
    """PEFT's name of an adapter with this encoder's output; None: PEFT has no such thing."""
    units: Units | None

    def __init__(self) -> None:
        super().__init__()
        self.units = None

    def network(self) -> Tensor:
        """The trained network's output, of the flat prompt's shape."""
        raise NotImplementedError

    def forward(self) -> Tensor:
        """The flat prompt."""
        z = self.network()
        return z if self.units is None else self.units(z)

    def state(self, flat: Tensor) -> PromptState:
        """``layout.state(flat)``."""
        return self.layout.state(flat)

    def last(self) -> nn.Linear | None:
        """The network's last layer; None: the network is its parameter ``embedding`` alone."""
        return None

    @torch.no_grad()
    def zero(self) -> None:
        """Make the network's output zero, by its last layer alone."""
        last = self.last()
        for parameter in [self.embedding] if last is None else last.parameters():
            parameter.zero_()  # type: ignore[operator]

    @torch.no_grad()
    def without_units(self) -> dict[str, Tensor]:
        """The parameters, by name, with which the network alone puts out the same flat prompt.

        Raises `ValueError` where a network with layers cannot: its ``units`` start from something.
        """
        found: dict[str, Tensor] = {k: v for k, v in self.state_dict().items() if not k.startswith("units.")}
        last = self.last()
        if self.units is None:
            return found
        if last is None:
            return {**found, "embedding": self()}
        if self.units.origin.any():
            raise ValueError("the network adds to an origin")
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        weight, bias, unit = last.weight, last.bias, self.units.unit
        return found | {names[id(weight)]: weight * unit[:, None], names[id(bias)]: bias * unit}

    def rates(self) -> Mapping[str, float]:
        """Parameter name -> factor of the learning rate, where it is not 1: what makes the rate independent of widths.

        Only in ``units``; without them every parameter has the rate itself.
        """
        return {} if self.units is None else self.width_rates()

    def width_rates(self) -> Mapping[str, float]:
        """`rates` of a network in units; see `matrix_rates`."""
        return {}

    def tensor_parallel_plan(self) -> Mapping[str, Any]:
        """Module name -> `torch.distributed.tensor.parallel` style for the wide layers; empty: all replicated."""
        return {}


def matrix_rates(network: nn.Module, rows: int) -> dict[str, float]:
    """Factors of the learning rate for a network's weight matrices ``[out, in]``: √rows / in. All else has 1.

    Under AdamW every weight moves by up to the rate. A sum over ``in`` inputs then moves by rate · in, so the rate is
    divided by ``in`` (Yang et al. 2022, Tensor Programs V, Table 8, https://arxiv.org/abs/2203.03466). The ``rows``
    that a prompt's network computes, one for each virtual token, share its weights while their features are
    independent: what moves one row is 1/√rows of a move, the rest is the other rows'.
    """
    shares = rows**0.5
    return {name: shares / weight.shape[1] for name, weight in network.named_parameters() if weight.ndim == 2}


@dataclass(frozen=True)
class HeadSettings:
    """A trained head on the backbone's last hidden states.

    ``pooling`` turns a sequence into one vector: its first token (``cls``), their ``mean`` or the ``last`` one;
    ``auto``: last for a decoder, cls for an encoder, mean for the encoder of an encoder-decoder, which has no trained
    first token. ``hidden_sizes``: widths of tanh layers before the output; none: linear.
    """

    pooling: Literal["auto", "cls", "mean", "last"] = "auto"
    hidden_sizes: tuple[int, ...] = ()


def same_backbone(one: str, other: str) -> bool:
    """Whether two fingerprints may be of the same backbone: all parts that both have are equal.

    The second part, of the linear layers, is missing where these are quantised.
    """
    return all(a == b for a, b in zip(one.split("-"), other.split("-"), strict=False))


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

    Padded: ``input_ids``, ``labels``, ``position_ids`` and ``token_type_ids`` are ``[B, S]``, padded on the right.
    Packed: they are ``[1, N]``, sequences one behind the other; ``cu_seqlens`` (int32, ``[sequences + 1]``) holds their
    boundaries and ``position_ids`` restart at 0 in each.

    ``labels``: what is to be predicted *at* each position (of a language model: its next token), `IGNORE_INDEX` where
    nothing is. ``lengths`` int64 ``[sequences]``; ``rows`` the rows of the data the sequences belong to, each of which
    has ``group`` consecutive sequences (no rows: a filler, whose forward pass runs for the sake of other ranks).
    ``source``: the encoder's side of an encoder-decoder batch, with the same rows.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    tokens: int
    supervised_tokens: int
    lengths: Tensor
    rows: tuple[int, ...] = ()
    group: int = 1
    token_type_ids: Tensor | None = None
    source: Batch | None = None

    @property
    def starts(self) -> Tensor:
        """Index of each sequence's first token among all positions, flattened; int64 ``[sequences]``."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens[:-1].long()
        return torch.arange(len(self.lengths), device=self.lengths.device) * self.input_ids.shape[1]

    @property
    def attention_mask(self) -> Tensor:
        """Padded batches: bool ``[B, S]``, true where there is a token."""
        column = torch.arange(self.input_ids.shape[1], device=self.lengths.device)
        return column < self.lengths[:, None]

    @property
    def has_padding(self) -> bool:
        """Whether a padded batch has any, without looking at tensors (a filler, which counts no tokens, has)."""
        own = self.tokens - (0 if self.source is None else self.source.tokens)
        return own < self.input_ids.numel()

    def map(self, change: Any) -> Batch:
        """The same batch with ``change(tensor)`` in place of every tensor."""
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        source = None if self.source is None else self.source.map(change)
        return replace(self, **tensors, source=source)

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return self.map(lambda tensor: to_device(tensor, device))


@dataclass(frozen=True)
class Sample:
    """A held-out row as a person reads it: its input, the text or label it should get, and what the model gave it.

    Of a label, a tagging or an answer also ``score``, the probability of what was given, and whether it is ``right``.
    """

    prompt: str
    reference: str
    text: str
    score: float | None = None
    right: bool | None = None


@dataclass(frozen=True)
class DataReport:
    """What tokenising did to the rows, so that it can be told: counts of rows, tokens and cuts.

    ``notes``: whatever else there is to say, a sentence each; ``ends``: the tokens that ended the texts.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    prompts_cut: int = 0
    completions_cut: int = 0
    texts_cut: int = 0
    notes: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()

    def __str__(self) -> str:
        line = f"{self.rows:,} rows, {self.tokens:,} tokens, {self.supervised_tokens:,} of them supervised"
        for name in ("prompts", "completions", "texts"):
            if count := getattr(self, f"{name}_cut"):
                line += f"; {count:,} {name} cut to the length allowed"
        return "; ".join((line, *self.notes))


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokenised rows, one behind the other. A row is ``group`` consecutive sequences (nearly always one).

    Sequence ``i`` lies at ``offsets[i]:offsets[i + 1]`` and has at least one token. ``tokens`` int32 ``[N]`` (negative:
    `virtual_id`); ``labels`` int32 ``[N]``: what is to be predicted at the position, `IGNORE_INDEX` if nothing (for
    language models the next token, so the last position of a sequence has none); ``offsets`` int64 ``[sequences + 1]``;
    ``token_types`` int8 ``[N]`` for backbones that tell two texts apart.
    ``source``: what the encoder of an encoder-decoder reads, row for row. ``aside``: whatever turning scores back into
    answers needs, one item a row.
    """

    tokens: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    report: DataReport
    group: int = 1
    token_types: np.ndarray | None = None
    source: Examples | None = None
    aside: tuple[Any, ...] | None = None

    @classmethod
    def of_text(cls, tokens: np.ndarray, supervised: np.ndarray, offsets: np.ndarray, report: DataReport) -> Examples:
        """Sequences for a language model: the label of a position is the next token where that is ``supervised``.

        ``supervised`` bool ``[N]``; the first token of a sequence is nothing's next token.
        """
        labels = np.full(len(tokens), IGNORE_INDEX, dtype=np.int32)
        labels[:-1] = np.where(supervised[1:], tokens[1:], IGNORE_INDEX)
        labels[offsets[1:] - 1] = IGNORE_INDEX
        return cls(tokens, labels, offsets, report)

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // self.group

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of the row's tokens and labels, each ``[length]``."""
        row = range(len(self))[row]
        piece = slice(self.offsets[row * self.group], self.offsets[(row + 1) * self.group])
        return self.tokens[piece], self.labels[piece]

    def digest(self) -> str:
        """A short identity of the content: the same rows tokenised the same way, and nothing else, give the same."""
        content = hashlib.sha256(str(self.group).encode())
        for array in (self.tokens, self.labels, self.offsets, self.token_types):
            content.update(b"" if array is None else array.tobytes())
        if self.source is not None:
            content.update(self.source.digest().encode())
        return content.hexdigest()[:16]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, of the encoder's side too, int64 ``[rows]``."""
        own = np.diff(self.offsets[:: self.group])
        return own if self.source is None else own + self.source.lengths
