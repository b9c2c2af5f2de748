"""Floating-point operations of a training step by formula: what a side of a benchmark computes, padding included.

A multiplication and an addition are two. A linear layer of ``in × out`` weights takes ``2 · in · out`` a row forward,
and the same again backward where the gradient passes through it to its input; only a trained head has a gradient of
its own. So a token costs 4N FLOPs over N frozen weights, less what lies in front of the first place where the prompt
enters. The language model's head counts for the positions that are projected. Attention takes ``2 · heads · (Dk +
Dv)`` a pair of a query and a key forward and ``2 · heads · (3 Dk + 2 Dv)`` backward, because flash kernels compute
the scores once more; hidden pairs count too, as in torch's ``FlopCounterMode``. Norms, softmax, rotary embeddings,
the cross-entropy, the prompt encoder and the optimizer are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ptd.types import AttentionKind, BackboneShape, Batch, PrefixKV, PromptState, SoftTokens

POSITIONS, SOURCE, SUPERVISED, SEQUENCES = "positions", "source", "supervised", "sequences"


@dataclass(frozen=True)
class Load:
    """What one micro-batch brings: ``rows`` that linear layers see, pairs of attention by the kind of its layer.

    ``rows``: positions of the text (of an encoder-decoder: of the target) and of the source, with padding and virtual
    tokens; supervised tokens; sequences.
    """

    rows: dict[str, int]
    own_pairs: dict[AttentionKind, int]
    prefix_pairs: dict[AttentionKind, int]


@dataclass(frozen=True)
class AttentionLayer:
    """``heads`` are the queries'; ``own_backward``: whether a gradient passes through the own tokens' part."""

    heads: int
    key_dim: int
    value_dim: int
    kind: AttentionKind
    own_backward: bool


@dataclass
class Formula:
    """``linear``: FLOPs a row of each kind, forward and backward together; ``recomputed``: gradient checkpointing."""

    linear: dict[str, int]
    attention: tuple[AttentionLayer, ...]
    recomputed: bool = False

    def flops(self, load: Load) -> int:
        """Of one micro-batch, forward and backward."""
        total = sum(cost * load.rows[kind] for kind, cost in self.linear.items())
        for layer in self.attention:
            once = 2 * layer.heads * (layer.key_dim + layer.value_dim) * (1 + self.recomputed)
            back = 2 * layer.heads * (3 * layer.key_dim + 2 * layer.value_dim)
            own, prefix = load.own_pairs.get(layer.kind, 0), load.prefix_pairs.get(layer.kind, 0)
            total += own * (once + back * layer.own_backward) + prefix * (once + back)
        return total


def load_of(batch: Batch, state: PromptState, kinds: set[AttentionKind]) -> Load:
    """What ptd runs for a micro-batch over a backbone whose attention layers are of these ``kinds``."""
    prefix = state.num_virtual_tokens if isinstance(state, PrefixKV) else 0
    in_front = state.num_virtual_tokens if isinstance(state, SoftTokens) and state.in_front else 0
    reader = batch if batch.source is None else batch.source
    lengths = {POSITIONS: _lengths(batch, 0 if batch.source is not None else in_front)}
    lengths[SOURCE] = _lengths(reader, in_front) if batch.source is not None else []
    rows = {kind: sum(values) for kind, values in lengths.items()}
    rows |= {SUPERVISED: batch.supervised_tokens, SEQUENCES: len(batch.rows) * batch.group}
    read = lengths[SOURCE] or lengths[POSITIONS]
    own: dict[AttentionKind, int] = {
        "decoder": sum(length * length for length in lengths[POSITIONS]),
        "encoder": sum(length * length for length in read),
        "cross": sum(a * b for a, b in zip(lengths[POSITIONS], lengths[SOURCE], strict=False)),
    }
    queries: dict[AttentionKind, int] = {
        "decoder": rows[POSITIONS], "encoder": sum(read), "cross": rows[POSITIONS],
    }  # fmt: skip
    return Load(rows, {kind: own[kind] for kind in kinds}, {kind: prefix * queries[kind] for kind in kinds})


def _lengths(batch: Batch, in_front: int) -> list[int]:
    """Positions of each sequence that are computed."""
    if batch.cu_seqlens is not None:
        return [length + in_front for length in batch.lengths.tolist()]
    count, width = batch.input_ids.shape
    return [width + in_front] * count


def padded_load(count: int, width: int, virtual_tokens: int, *, prefix: bool) -> Load:
    """What PEFT runs: ``count`` rows of ``width`` positions, the head on all of them; ``prefix``: in the cache."""
    extra = 0 if prefix else virtual_tokens
    positions = count * (width + extra)
    keys = width + virtual_tokens
    return Load({POSITIONS: positions}, {"decoder": positions * keys}, {})


def attention_layers(
    shape: BackboneShape, config: Any, state: PromptState, *, checkpointed: bool
) -> tuple[AttentionLayer, ...]:
    """The attention of a backbone with this transformers ``config``, as ptd runs it with this kind of prompt."""
    heads = config.get_text_config().num_attention_heads
    soft, seen, found = isinstance(state, SoftTokens), set(), []
    for index, layer in enumerate(shape.layers):
        # What a stack's first layer makes of the bare tokens depends on nothing trained; but for checkpointing
        # transformers has the embeddings require a gradient.
        bare = layer.kind != "cross" and layer.kind not in seen and not (soft and index == 0) and not checkpointed
        trained = bool(state.num_virtual_tokens) and not bare
        found.append(AttentionLayer(heads, layer.key_dim, layer.value_dim, layer.kind, trained))
        seen.add(layer.kind)
    return tuple(found)


def observed(module: nn.Module, load: Load, step: Callable[[], Any], head: nn.Module | None = None) -> dict[str, int]:
    """FLOPs a row of the linear layers in ``module``, from what they do in one ``step`` (forward and backward).

    ``load`` is that step's; its kinds of rows have to differ in number (`distinct`). A ``head`` that the step goes past
    (a fused cross-entropy does) counts for the supervised tokens. Raises `LookupError` for what it cannot count.
    """
    if any(parameter.ndim == 3 for parameter in module.parameters()):
        raise LookupError("it has mixtures of experts, which are no linear layers")
    kinds = {count: kind for kind, count in reversed(load.rows.items()) if count}
    seen: dict[int, int] = {}
    used: set[nn.Module] = set()
    with _hooked(module, seen, used), torch.compiler.set_stance("force_eager"):
        step()
    costs: dict[str, int] = {}
    for rows, cost in seen.items():
        if rows not in kinds:
            raise LookupError(f"some linear layers run on {rows} rows, which is none of {load.rows}")
        costs[kinds[rows]] = costs.get(kinds[rows], 0) + cost
    if isinstance(head, nn.Linear) and head not in used:
        costs[SUPERVISED] = costs.get(SUPERVISED, 0) + 4 * head.in_features * head.out_features
    return costs


def distinct(load: Load) -> bool:
    """Whether the kinds of rows can be told apart by their numbers. Labels of whole sequences are as many as these."""
    counts = [count for kind, count in load.rows.items() if count and kind != SEQUENCES]
    whole = load.rows.get(SEQUENCES, 0)
    return len(set(counts)) == len(counts) and whole not in (load.rows[POSITIONS], load.rows.get(SOURCE))


@contextmanager
def _hooked(module: nn.Module, seen: dict[int, int], used: set[nn.Module]) -> Iterator[None]:
    """While active, ``seen[rows]`` sums FLOPs a row: forward as layers run, backward as gradients pass through them."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        given = inputs[0]
        if not given.numel():  # a head that a fused cross-entropy went past
            return
        rows, cost = given.numel() // given.shape[-1], 2 * _size(layer)
        used.add(layer)
        seen[rows] = seen.get(rows, 0) + cost
        passes = given.requires_grad + layer.get_parameter("weight").requires_grad  # a trained head has both
        if passes and output.requires_grad:

            def passed(gradient: Tensor) -> None:
                seen[rows] += passes * cost

            output.register_hook(passed)

    handles = [each.register_forward_hook(hook) for each in module.modules() if isinstance(each, (nn.Linear, Conv1D))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _size(layer: nn.Module) -> int:
    sizes: Any = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else (layer.nx, layer.nf)
    return int(math.prod(sizes))
