"""The types that the stages of ptd pass to each other (see docs/architecture.md).

Letters for shapes, used everywhere: P virtual tokens, L attention layers, H key/value heads, D head size, B sequences,
S tokens of a sequence, N tokens of a packed row, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ptd.async_copy import to_device
from ptd.errors import Preempted as Preempted
from ptd.errors import RankError as RankError
from ptd.errors import UserError as UserError

IGNORE_INDEX = -100
"""Label of a position that carries no loss (the value Hugging Face and torch use)."""

NO_MEMBER = -1
"""In place of a prompt's number: a sequence that reads no prompt."""

BLOCK = 2**18
"""Tokens that are read at a time where all tokens of `Examples` are read."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Name in ``backbone.dtype`` -> dtype of the backbone's weights."""


Architecture = Literal["decoder", "encoder", "encoder-decoder"]
"""The kind of transformer that a backbone is."""

Output = Literal["causal_lm", "masked_lm", "seq2seq_lm", "body"]
"""What a backbone puts out: the logits of a language model, or its last hidden states (``body``)."""

AttentionKind = Literal["decoder", "encoder", "cross"]
"""The kind of an attention layer: self-attention in a decoder (causal) or an encoder, or cross-attention."""


@dataclass(frozen=True)
class LayerShape:
    """Key/value geometry of one attention layer."""

    kv_heads: int
    key_dim: int
    value_dim: int
    kind: AttentionKind = "decoder"

    @property
    def numel(self) -> int:
        """The numbers that one virtual token needs in this layer, for its key and its value."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class BackboneShape:
    """All that a method may know of the backbone: plain sizes, no transformers object.

    ``layers``: the attention layers in the order in which a forward pass calls them. ``no_prefix``: why the backbone
    takes no prefix, and what to use instead.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    context: int | None
    layers: tuple[LayerShape, ...]
    embedding_size: int | None = None
    no_prefix: str | None = None

    def prefix_layers(self) -> tuple[LayerShape, ...]:
        """Return ``layers``. Raises `UserError` if the backbone takes no prefix."""
        if self.no_prefix is not None:
            raise UserError(
                f"method.name: backbones of type {self.model_type!r} take no prefix, because {self.no_prefix}"
            )
        return self.layers

    @property
    def input_size(self) -> int:
        """Width of the input embeddings: the hidden size, except in families that project the embeddings (OPT-350m)."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size


@dataclass(frozen=True)
class PrefixKV:
    """Keys and values that every query of a layer attends to in addition to the tokens of its sequence.

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

    ``in_front``: the virtual tokens precede every sequence (in an encoder-decoder, every sequence of the encoder).
    Otherwise the sequences themselves contain them: token id ``virtual_id(i)`` stands for row ``i``.
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
    """No prompt: the backbone reads only the tokens."""

    num_virtual_tokens = 0

    def tensors(self) -> Iterator[Tensor]:
        yield from ()


PromptState = PrefixKV | SoftTokens | NoPrompt
"""What a prompt encoder passes to the injection. The injection dispatches on the type; the engine does not."""


@dataclass(frozen=True)
class Prompts:
    """Several prompts, of which each sequence of a batch reads one or none (``Batch.members``).

    All ``members`` are keys and values, or all are soft tokens; those without a prompt (`NoPrompt`) fit both. They may
    have different numbers of virtual tokens. Raises `UserError` for prompts of both kinds.
    """

    members: tuple[PromptState, ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("there are no prompts; give at least one")
        kinds = {type(member) for member in self.members} - {NoPrompt}
        if len(kinds) > 1:
            raise UserError(
                "one batch cannot have prompts of two kinds, keys and values (prefix, p_tuning_v2) and soft tokens "
                "(prompt, p_tuning); use prompts of one kind together"
            )

    def tensors(self) -> Iterator[Tensor]:
        for member in self.members:
            yield from member.tensors()


def virtual_id(index: int) -> int:
    """Return the token id of virtual token ``index`` in a sequence: a negative id, which no vocabulary contains."""
    return -1 - index


@dataclass(frozen=True)
class PrefixLayout:
    """Flat ``[P, W]``: the columns are ordered by layer, then keys before values, then kv head, then head dim."""

    layers: tuple[LayerShape, ...]

    @property
    def width(self) -> int:
        return sum(layer.numel for layer in self.layers)

    def state(self, flat: Tensor) -> PrefixKV:
        shapes = [(layer.kv_heads, dim) for layer in self.layers for dim in (layer.key_dim, layer.value_dim)]
        # One split for all layers: its backward concatenates the gradients once, whereas one slice per layer would
        # allocate and add one full-size gradient per layer.
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
    """Flat ``[0, 0]``: no prompt."""

    width = 0

    def state(self, flat: Tensor) -> NoPrompt:
        return NoPrompt()


class Units(nn.Module):
    """The scale of the backbone's own values, in which a prompt is trained: ``flat = origin + unit · z``.

    Only ``z`` ``[P, W]`` is trained. AdamW moves every number by up to the learning rate per step, however large the
    number is. So a learning rate means the same for every backbone only if it applies to ``z``. ``unit`` ``[W]`` is
    proportional to the root mean square of the backbone's own keys, values or embeddings in each column; ``origin``
    ``[P, W]`` is the prompt at ``z = 0``. Both are fixed.
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
    """The trained module, which has no input and one flat output. A method's encoder derives from this class.

    ``forward() -> Tensor`` returns the flat prompt, the only tensor whose gradient is reduced over ranks. A subclass
    defines `network`, whose output is the flat prompt in ``units``. If ``units`` is None, the output is the flat prompt
    itself, as in runs from before ptd had units.
    """

    layout: PrefixLayout | SoftLayout | EmptyLayout
    peft_type: str | None = None
    """PEFT's name of an adapter with this encoder's output; None if PEFT has no such adapter."""
    units: Units | None

    def __init__(self) -> None:
        super().__init__()
        self.units = None

    def network(self) -> Tensor:
        """Return the trained network's output, in the shape of the flat prompt."""
        raise NotImplementedError

    def forward(self) -> Tensor:
        """Return the flat prompt."""
        z = self.network()
        return z if self.units is None else self.units(z)

    def state(self, flat: Tensor) -> PromptState:
        """Return ``layout.state(flat)``."""
        return self.layout.state(flat)

    def last(self) -> nn.Linear | None:
        """Return the network's last layer; None if the network is only its parameter ``embedding``."""
        return None

    @torch.no_grad()
    def zero(self) -> None:
        """Make the network's output zero by changing only its last layer."""
        last = self.last()
        for parameter in [self.embedding] if last is None else last.parameters():
            parameter.zero_()  # type: ignore[operator]

    @torch.no_grad()
    def without_units(self) -> dict[str, Tensor]:
        """Return the parameters, by name, with which the network puts out the same flat prompt without ``units``.

        Raises `ValueError` if a network with layers has ``units`` with a nonzero origin, which it cannot represent.
        """
        found: dict[str, Tensor] = {k: v for k, v in self.state_dict().items() if not k.startswith("units.")}
        last = self.last()
        if self.units is None:
            return found
        if last is None:
            return {**found, "embedding": self()}
        if self.units.origin.any():
            raise ValueError("the network's last layer cannot represent a nonzero origin")
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        weight, bias, unit = last.weight, last.bias, self.units.unit
        return found | {names[id(weight)]: weight * unit[:, None], names[id(bias)]: bias * unit}

    def rates(self) -> Mapping[str, float]:
        """Return parameter name -> factor of the learning rate, where the factor is not 1.

        The factors make the learning rate independent of widths. Without ``units`` every factor is 1.
        """
        return {} if self.units is None else self.width_rates()

    def width_rates(self) -> Mapping[str, float]:
        """Return the `rates` of a network in units; see `matrix_rates`."""
        return {}

    def tensor_parallel_plan(self) -> Mapping[str, Any]:
        """Return module name -> `torch.distributed.tensor.parallel` style of the wide layers; empty: all replicated."""
        return {}


def matrix_rates(network: nn.Module, rows: int) -> dict[str, float]:
    """Return the learning-rate factors of a network's weight matrices ``[out, in]``: √rows / in. Other factors are 1.

    AdamW moves every weight by up to the learning rate. A sum over ``in`` inputs then moves by up to rate · in, so the
    rate is divided by ``in`` (Yang et al. 2022, Tensor Programs V, Table 8, https://arxiv.org/abs/2203.03466). A
    prompt's network computes ``rows`` rows, one per virtual token, which share the weights but have independent
    features. Only 1/√rows of a weight's move then serves a given row, and the rest serves the other rows; hence √rows.
    """
    shares = rows**0.5
    return {name: shares / weight.shape[1] for name, weight in network.named_parameters() if weight.ndim == 2}


@dataclass(frozen=True)
class HeadSettings:
    """A trained head on the backbone's last hidden states.

    ``pooling`` turns the hidden states of a sequence into one vector: that of the first token (``cls``), the ``mean``
    of all tokens, or that of the ``last`` token. ``auto``: ``last`` for a decoder, ``cls`` for an encoder, ``mean`` for
    the encoder of an encoder-decoder, which has no trained first token. ``hidden_sizes``: widths of the tanh layers
    before the output; empty: a linear head.
    """

    pooling: Literal["auto", "cls", "mean", "last"] = "auto"
    hidden_sizes: tuple[int, ...] = ()


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether a parameter is partitioned over ranks by DeepSpeed ZeRO-3."""
    return hasattr(parameter, "ds_id")


def same_backbone(one: str, other: str) -> bool:
    """Return whether two fingerprints may belong to the same backbone: all parts that both have are equal.

    The second part, for the linear layers, is missing if these are quantised.
    """
    return all(a == b for a, b in zip(one.split("-"), other.split("-"), strict=False))


class Reporter:
    """Receives the progress of long work. This class is silent; the command line uses one that prints."""

    def note(self, text: str) -> None:
        """Report a line of text for the user."""

    def start(self, task: str, total: int, done: int = 0) -> None:
        """Report that a task of ``total`` steps begins, of which ``done`` are already done."""

    def advance(self, task: str, done: int, line: str | None = None) -> None:
        """Report that ``done`` steps of the task are done; ``line``: a line of text about the task, if any."""

    def finish(self, task: str) -> None:
        """Report that the task is finished."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Padded: ``input_ids``, ``labels``, ``position_ids`` and ``token_type_ids`` are ``[B, S]``, padded on the right.
    Packed: they are ``[1, N]``, with the sequences concatenated; ``cu_seqlens`` (int32, ``[sequences + 1]``) holds the
    boundaries of the sequences, and ``position_ids`` restart at 0 in each sequence.

    ``labels``: what to predict *at* each position (for a language model, the next token), or `IGNORE_INDEX` for
    nothing. ``lengths``: int64 ``[sequences]``. ``rows``: the rows of the data that the sequences belong to; each row
    has ``group`` consecutive sequences. A batch without rows is a padding batch, whose forward pass runs only because
    other ranks need it. ``source``: the encoder's side of an encoder-decoder batch, with the same rows. ``members``:
    for each sequence, the number of the prompt that it reads, or `NO_MEMBER`; None: all read the only prompt.
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
    members: tuple[int, ...] | None = None

    @property
    def starts(self) -> Tensor:
        """Index of each sequence's first token in the flattened positions; int64 ``[sequences]``."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens[:-1].long()
        return torch.arange(len(self.lengths), device=self.lengths.device) * self.input_ids.shape[1]

    @property
    def attention_mask(self) -> Tensor:
        """For padded batches: bool ``[B, S]``, true at tokens, false at padding."""
        column = torch.arange(self.input_ids.shape[1], device=self.lengths.device)
        return column < self.lengths[:, None]

    @property
    def has_padding(self) -> bool:
        """Whether a padded batch has padding, found without reading tensors (true for a batch without rows)."""
        own = self.tokens - (0 if self.source is None else self.source.tokens)
        return own < self.input_ids.numel()

    def map(self, change: Any) -> Batch:
        """Return the batch with ``change(tensor)`` in place of every tensor."""
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        source = None if self.source is None else self.source.map(change)
        return replace(self, **tensors, source=source)

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return self.map(lambda tensor: to_device(tensor, device))


@dataclass(frozen=True)
class Sample:
    """A held-out row in readable form: its input, the expected text or label, and the model's output.

    For a label, tags or an answer, ``score`` is the probability of the model's output and ``right`` says whether the
    output is correct.
    """

    prompt: str
    reference: str
    text: str
    score: float | None = None
    right: bool | None = None


@dataclass(frozen=True)
class DataReport:
    """What tokenising did to the rows, for messages: counts of rows, tokens and truncated texts.

    ``notes``: further remarks, one sentence each; ``ends``: the tokens that ended the texts.
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
                line += f"; {count:,} {name} truncated to the maximum length"
        return "; ".join((line, *self.notes))

    def __add__(self, other: DataReport) -> DataReport:
        """Return the report on the rows of both reports; a note or end that both have appears once."""
        counts = {
            name: getattr(self, name) + getattr(other, name)
            for name in ("rows", "tokens", "supervised_tokens", "prompts_cut", "completions_cut", "texts_cut")
        }
        notes = tuple(dict.fromkeys((*self.notes, *other.notes)))
        return DataReport(**counts, notes=notes, ends=tuple(sorted({*self.ends, *other.ends})))


@dataclass(frozen=True, eq=False)
class Summary:
    """What is computed once from all tokens and labels of `Examples`, because it takes a pass over all of them.

    ``supervised``: int32 ``[rows]``, the number of labels of each row. ``highest_token`` and ``highest_label``: the
    largest values, at least -1. ``digest``: the result of `Examples.digest`.
    """

    supervised: np.ndarray
    highest_token: int
    highest_label: int
    digest: str


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokenised rows, concatenated. A row is ``group`` consecutive sequences (nearly always one).

    Sequence ``i`` is ``tokens[offsets[i]:offsets[i + 1]]`` and has at least one token. ``tokens``: int32 ``[N]``
    (negative: `virtual_id`). ``labels``: int32 ``[N]``, what to predict at each position, or `IGNORE_INDEX` for nothing
    (for language models the next token, so the last position of a sequence has no label). ``offsets``: int64
    ``[sequences + 1]``. ``token_types``: int8 ``[N]``, for backbones that distinguish two texts.
    ``source``: what the encoder of an encoder-decoder reads, row for row. ``aside``: arrays, by name, that the task
    needs to turn scores back into answers. ``known``: the `summary` of arrays that are mapped from a file.
    ``members``: int64 ``[rows]``, which of several prompts a row reads, or `NO_MEMBER`; None: there is one prompt.

    The arrays may be read-only maps of files (`ptd.data.cache`), so code that reads all of them does it in blocks.
    """

    tokens: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    report: DataReport
    group: int = 1
    token_types: np.ndarray | None = None
    source: Examples | None = None
    aside: Mapping[str, np.ndarray] | None = None
    known: Summary | None = None
    members: np.ndarray | None = None

    @classmethod
    def of_text(cls, tokens: np.ndarray, supervised: np.ndarray, offsets: np.ndarray, report: DataReport) -> Examples:
        """Build sequences for a language model: the label of a position is the next token, if it is ``supervised``.

        ``supervised``: bool ``[N]``. The first token of a sequence is never a label.
        """
        labels = np.full(len(tokens), IGNORE_INDEX, dtype=np.int32)
        labels[:-1] = np.where(supervised[1:], tokens[1:], IGNORE_INDEX)
        labels[offsets[1:] - 1] = IGNORE_INDEX
        return cls(tokens, labels, offsets, report)

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // self.group

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return views of the row's tokens and labels, each ``[length]``."""
        row = range(len(self))[row]
        piece = slice(self.offsets[row * self.group], self.offsets[(row + 1) * self.group])
        return self.tokens[piece], self.labels[piece]

    def digest(self) -> str:
        """Return a short hash of the content: it is equal only for the same rows tokenised the same way."""
        return self.summary.digest

    @cached_property
    def summary(self) -> Summary:
        """The label counts, largest ids and digest. Without ``known``, they are computed in blocks of rows."""
        if self.known is not None:
            return self.known
        bounds = self.offsets[:: self.group]
        supervised = np.zeros(len(self), dtype=np.int32)
        highest_token = highest_label = -1
        for first, stop in self.blocks():
            piece = slice(bounds[first], bounds[stop])
            tokens, labels = self.tokens[piece], self.labels[piece]
            counted = np.concatenate(([0], np.cumsum(labels != IGNORE_INDEX)))
            supervised[first:stop] = np.diff(counted[bounds[first : stop + 1] - bounds[first]])
            highest_token = max(highest_token, int(tokens.max(initial=-1)))
            highest_label = max(highest_label, int(labels.max(initial=-1)))
        content = hashlib.sha256(str(self.group).encode())
        further = [array for array in (self.token_types, self.members) if array is not None]
        for array in (self.tokens, self.labels, self.offsets, *further):
            for begin in range(0, len(array), BLOCK):
                content.update(array[begin : begin + BLOCK].tobytes())
        if self.source is not None:
            content.update(self.source.digest().encode())
        return Summary(supervised, highest_token, highest_label, content.hexdigest()[:16])

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the first row and the end of consecutive blocks of rows with about `BLOCK` tokens."""
        first = 0
        while first < len(self):
            end = self.offsets[first * self.group] + BLOCK
            stop = (int(np.searchsorted(self.offsets, end, side="right")) - 1) // self.group
            stop = max(stop, first + 1)
            yield first, stop
            first = stop

    def lengths(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the number of tokens of ``rows``, including the encoder's side; int64 ``[rows]``.

        A slice has no step. Nothing is stored: all lengths of millions of rows would take more memory than a batch.
        """
        bounds = self.offsets[:: self.group]
        if isinstance(rows, slice):
            first, stop, _ = rows.indices(len(self))
            own = np.diff(bounds[first : stop + 1])
        else:
            own = bounds[rows + 1] - bounds[rows]
        return own if self.source is None else own + self.source.lengths(rows)

    @cached_property
    def longest(self) -> int:
        """Number of tokens of the longest row, including the encoder's side."""
        return max(int(self.lengths(slice(first, stop)).max()) for first, stop in self.blocks())

    @cached_property
    def longest_sequence(self) -> int:
        """Number of tokens of the longest sequence, of either side."""
        own = max(
            int(np.diff(self.offsets[first * self.group : stop * self.group + 1]).max())
            for first, stop in self.blocks()
        )
        return own if self.source is None else max(own, self.source.longest_sequence)
