"""Count the floating-point operations of a benchmark side's training step by formula, padding included.

A multiplication and an addition count as two operations. A linear layer of ``in × out`` weights takes ``2 · in · out``
per row in the forward pass, and the same in the backward pass where the gradient passes through the layer to its input;
only the weights of a trained head have a gradient themselves. So a token costs 4N FLOPs over N frozen weights, minus
the backward pass of the layers before the point where the prompt enters. The language model's head counts for the
positions that are projected. Attention takes ``2 · heads · (Dk + Dv)`` per pair of a query and a key in the forward
pass and ``2 · heads · (3 Dk + 2 Dv)`` in the backward pass, because flash kernels compute the scores again; pairs that
the mask hides count too, as in torch's ``FlopCounterMode``. Norms, softmax, rotary embeddings, the cross-entropy, the
prompt encoder and the optimizer are not counted.
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
    """The work of one micro-batch: ``rows`` of linear layers, and query-key pairs by kind of attention layer.

    ``rows``: positions of the text (of an encoder-decoder: of the target) and of the source, with padding and virtual
    tokens; supervised tokens; sequences. ``own_pairs`` have keys of the tokens, ``prefix_pairs`` keys of the prefix.
    """

    rows: dict[str, int]
    own_pairs: dict[AttentionKind, int]
    prefix_pairs: dict[AttentionKind, int]


@dataclass(frozen=True)
class AttentionLayer:
    """``heads``: query heads; ``own_backward``: whether a gradient passes through pairs with the tokens' own keys."""

    heads: int
    key_dim: int
    value_dim: int
    kind: AttentionKind
    own_backward: bool


@dataclass
class Formula:
    """``linear``: FLOPs per row of each kind, forward and backward together; ``recomputed``: gradient checkpointing."""

    linear: dict[str, int]
    attention: tuple[AttentionLayer, ...]
    recomputed: bool = False

    def flops(self, load: Load) -> int:
        """Return the FLOPs of one micro-batch, forward and backward."""
        total = sum(cost * load.rows[kind] for kind, cost in self.linear.items())
        for layer in self.attention:
            once = 2 * layer.heads * (layer.key_dim + layer.value_dim) * (1 + self.recomputed)
            back = 2 * layer.heads * (3 * layer.key_dim + 2 * layer.value_dim)
            own, prefix = load.own_pairs.get(layer.kind, 0), load.prefix_pairs.get(layer.kind, 0)
            total += own * (once + back * layer.own_backward) + prefix * (once + back)
        return total


def load_of(batch: Batch, state: PromptState, kinds: set[AttentionKind]) -> Load:
    """Return what ptd computes for a micro-batch over a backbone whose attention layers are of these ``kinds``."""
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
    """Return the number of positions that are computed for each sequence."""
    if batch.cu_seqlens is not None:
        return [length + in_front for length in batch.lengths.tolist()]
    count, width = batch.input_ids.shape
    return [width + in_front] * count


def padded_load(count: int, width: int, virtual_tokens: int, *, prefix: bool) -> Load:
    """Return what PEFT computes for ``count`` rows of ``width`` positions, with the head on all positions.

    ``prefix``: the virtual tokens are keys and values in the cache, not positions.
    """
    extra = 0 if prefix else virtual_tokens
    positions = count * (width + extra)
    keys = width + virtual_tokens
    return Load({POSITIONS: positions}, {"decoder": positions * keys}, {})


def attention_layers(
    shape: BackboneShape, config: Any, state: PromptState, *, checkpointed: bool
) -> tuple[AttentionLayer, ...]:
    """Return the attention layers of a backbone with this transformers ``config`` and this kind of prompt in ptd."""
    heads = config.get_text_config().num_attention_heads
    soft, seen, found = isinstance(state, SoftTokens), set(), []
    for index, layer in enumerate(shape.layers):
        # The first layer of a stack sees the tokens before any prompt, so no gradient passes through their own keys;
        # with gradient checkpointing one does, because transformers makes the embeddings require a gradient.
        bare = layer.kind != "cross" and layer.kind not in seen and not (soft and index == 0) and not checkpointed
        trained = bool(state.num_virtual_tokens) and not bare
        found.append(AttentionLayer(heads, layer.key_dim, layer.value_dim, layer.kind, trained))
        seen.add(layer.kind)
    return tuple(found)


def observed(module: nn.Module, load: Load, step: Callable[[], Any], head: nn.Module | None = None) -> dict[str, int]:
    """Return the FLOPs per row of the linear layers in ``module``, observed in one ``step`` (forward and backward).

    ``load`` is the load of that step; its kinds of rows have to differ in number (`distinct`). A ``head`` that the step
    bypasses (as a fused cross-entropy does) counts for the supervised tokens. Raises `LookupError` for a module whose
    FLOPs it cannot count.
    """
    if any(parameter.ndim == 3 for parameter in module.parameters()):
        raise LookupError("it has mixtures of experts, which are not linear layers")
    kinds = {count: kind for kind, count in reversed(load.rows.items()) if count}
    seen: dict[int, int] = {}
    used: set[nn.Module] = set()
    with _hooked(module, seen, used), torch.compiler.set_stance("force_eager"):
        step()
    costs: dict[str, int] = {}
    for rows, cost in seen.items():
        if rows not in kinds:
            raise LookupError(f"some linear layers run on {rows} rows, which matches none of {load.rows}")
        costs[kinds[rows]] = costs.get(kinds[rows], 0) + cost
    if isinstance(head, nn.Linear) and head not in used:
        costs[SUPERVISED] = costs.get(SUPERVISED, 0) + 4 * head.in_features * head.out_features
    return costs


def distinct(load: Load) -> bool:
    """Return whether all kinds of rows differ in number; sequences may equal supervised tokens (one label each)."""
    counts = [count for kind, count in load.rows.items() if count and kind != SEQUENCES]
    whole = load.rows.get(SEQUENCES, 0)
    return len(set(counts)) == len(counts) and whole not in (load.rows[POSITIONS], load.rows.get(SOURCE))


@contextmanager
def _hooked(module: nn.Module, seen: dict[int, int], used: set[nn.Module]) -> Iterator[None]:
    """Sum FLOPs per row in ``seen[rows]``: forward as layers run, backward as gradients pass through them."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        given = inputs[0]
        if not given.numel():  # a head that a fused cross-entropy bypasses
            return
        rows, cost = given.numel() // given.shape[-1], 2 * _size(layer)
        used.add(layer)
        seen[rows] = seen.get(rows, 0) + cost
        passes = given.requires_grad + layer.get_parameter("weight").requires_grad  # both for a trained head
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
