"""Find a model's attention layers in one forward pass: their order, their sizes and the rule that each layer follows.

A layer's rule (causal or not, its window) is read from the mask that the model makes for the layer. The module's own
``is_causal`` is trusted only if there is no mask: NLLB-MoE's decoder layers claim not to be causal.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from ptd_kernels import MAX_HEAD_SIZE
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers import PreTrainedModel

from ptd.inject.attention import Call, Probe, probed
from ptd.inject.model_cache import cached_layers
from ptd.inject.stack import Stack, sides_of
from ptd.types import AttentionKind, BackboneShape, LayerShape, UserError

SOFTMAX = {"full_attention", "sliding_attention", "chunked_attention"}
"""Types of layers, in a config's ``layer_types``, in which each query attends to keys of single tokens."""
RECURRENT = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mlp", "moe"}
"""Types of layers that read a row token by token, or each token alone: what padding does to them shows at once."""
FAR = 1_000_000
"""Position of a query, beyond every window, at which a mask's rule is evaluated."""


def layer_types(config: Any) -> set[str]:
    """Return the types of layers that the text model's config names; empty if it names none."""
    return set(getattr(config.get_text_config(), "layer_types", None) or [])


@torch.no_grad()
def probe(model: PreTrainedModel) -> tuple[list[Call], Any]:
    """Return the attention calls of the model's own forward pass in their order, and the output of that pass.

    Under ZeRO-3 all ranks have to call this function at the same time.
    """
    device = next(model.parameters()).device
    tokens = torch.zeros(1, 3, dtype=torch.long, device=device)
    inputs = {"input_ids": tokens[:, :2], "attention_mask": torch.ones_like(tokens[:, :2])}
    if len(sides_of(model)) == 2:  # the encoder gets one token more, which identifies cross-attention
        inputs = {"input_ids": tokens, "attention_mask": tokens + 1, "decoder_input_ids": tokens[:, :2]}
    seen = Probe()
    token = probed.set(seen)
    try:
        output = model(**inputs)
    finally:
        probed.reset(token)
    return [_as_masked(call) for call in seen.calls], output


@torch.no_grad()
def cache_shapes(model: PreTrainedModel) -> tuple[tuple[LayerShape, ...] | str, Any]:
    """Return the layers of the model's cache, or why it cannot hold a prefix, and the output of a pass over two tokens.

    Under ZeRO-3 all ranks have to call this function at the same time.
    """
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    inputs = {"input_ids": tokens, "attention_mask": tokens + 1}
    if len(sides_of(model)) == 2:
        output = model(**inputs, decoder_input_ids=tokens)
        return "ptd's prefix of an encoder-decoder is in its encoder, too, which has no cache", output
    takes = inspect.signature(model.forward).parameters
    if "past_key_values" not in takes and not any(each.kind is each.VAR_KEYWORD for each in takes.values()):
        return "it takes no cache of keys and values", model(**inputs)
    try:
        output = model(**inputs, use_cache=True)
    except Exception as error:  # a model without a cache may still take a soft prompt
        return f"its cache cannot be filled ({type(error).__name__}: {error})", model(**inputs, use_cache=False)
    return cached_layers(output.get("past_key_values"), tokens.shape[1]), output


def _as_masked(call: Call) -> Call:
    """Return the call with the causal rule that its mask shows."""
    if call.mask is None or isinstance(call.mask, FakeTensor) or call.queries < 2:
        return call
    first_query = call.mask.expand(-1, -1, call.queries, -1)[..., 0, 1:]
    seen = first_query if first_query.dtype == torch.bool else first_query > torch.finfo(first_query.dtype).min / 2
    return replace(call, causal=not bool(seen.any()))


def packing_obstacle(call: Call) -> str | None:
    """Return why attention cannot follow the layer's rule without a mask, as packed batches require; None: it can.

    A packed batch has no mask: attention within each sequence is causal (or complete) and limited to ``window``.
    """
    if call.mask is None:
        return None
    if call.rule is None:
        return "makes its own attention masks"
    seen = _far_off(call.rule, call.window)
    if seen is None:
        return "has an attention mask that depends on more than positions"
    want = [call.causal is False or distance >= 0 for distance in _distances(call.window)]
    if call.window is not None:
        want = [
            visible and distance < call.window for visible, distance in zip(want, _distances(call.window), strict=True)
        ]
    return None if seen == want else "has an attention mask that is neither causal nor a sliding window"


def _distances(window: int | None) -> list[int]:
    """Return distances of keys before a query (negative: after it): near, far, and at the border of the window."""
    border = [] if window is None else [window - 1, window]
    return [-5000, -1, 0, 1, *border, 511, 5000, FAR]


def _far_off(rule: Any, window: int | None) -> list[bool] | None:
    """Return whether a query at `FAR` sees keys at each of `_distances`; None if the rule cannot be evaluated."""
    keys = [FAR - distance for distance in _distances(window)]
    try:
        with unset_fake_temporarily():
            zero, query = torch.tensor(0), torch.tensor(FAR)
            return [bool(rule(zero, zero, query, torch.tensor(key))) for key in keys]
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None


def layer_shapes(model: PreTrainedModel, calls: list[Call], stacks: list[Stack]) -> tuple[LayerShape, ...]:
    """Return the attention layers in the order of their calls. Raises `UserError` if a layer cannot take a prefix."""
    config, name = model.config.get_text_config(), type(model).__name__
    modules = len({id(call.module) for call in calls})
    if not calls:
        raise UserError(
            f"backbone.path: {name} has no attention layer that calls transformers' AttentionInterface, so no prompt "
            "can be attached to it; use a backbone of another family"
        )
    if modules != len(calls):
        raise UserError(
            f"backbone.path: {name} computes attention {len(calls)} times per forward pass in {modules} modules; a "
            "prefix needs exactly one call per module, so use a backbone of another family"
        )
    if len(stacks) == 1 and len(calls) != config.num_hidden_layers:
        raise UserError(
            f"backbone.path: {name} has {config.num_hidden_layers} layers, of which {len(calls)} compute attention "
            "through transformers' AttentionInterface; use a backbone in which every layer does"
        )
    return tuple(_layer(call, within_encoder=call.module in stacks[0].members, two=len(stacks) == 2) for call in calls)


def shape_of(
    model: PreTrainedModel, layers: tuple[LayerShape, ...], reader: Stack, no_prefix: str | None
) -> BackboneShape:
    """Return the sizes of the model; the stack ``reader`` embeds its tokens. ``no_prefix``: why it takes no prefix."""
    config = model.config.get_text_config()
    context = context_of(config)
    context = None if context is None else context - reader.first_position
    width: int = reader.embeddings.embedding_dim
    return BackboneShape(config.model_type, config.hidden_size, config.vocab_size, context, layers, width, no_prefix)


def _layer(call: Call, within_encoder: bool, two: bool) -> LayerShape:
    size = max(call.key_dim, call.value_dim)
    if size > MAX_HEAD_SIZE:
        raise UserError(
            f"a layer of this backbone has heads of size {size}, but attention with a prefix supports sizes up "
            f"to {MAX_HEAD_SIZE}; use another backbone"
        )
    kind: AttentionKind = "decoder" if call.causal else "encoder"
    if two:
        kind = "encoder" if within_encoder else "decoder" if call.queries == call.keys else "cross"
    return LayerShape(call.kv_heads, call.key_dim, call.value_dim, kind)


def context_of(config: Any) -> int | None:
    """Return the number of positions of the backbone; None if its config does not say or its positions are relative.

    Rotary frequencies of type dynamic and longrope change for a whole batch when one of its rows is longer than the
    original context. A row's result would then depend on the other rows, so the original context is the limit.
    """
    if hasattr(config, "relative_attention_num_buckets"):
        return None
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    limits = [limit for limit in named if isinstance(limit, int) and limit > 0][:1]  # XLNet's is -1: none
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *(each for each in rope.values() if isinstance(each, dict))):  # one entry per type of layer
        original = kind.get("original_max_position_embeddings")
        if kind.get("rope_type") in ("dynamic", "longrope") and isinstance(original, int):
            limits.append(original)
    return min(limits, default=None)


def ordinary_tokens(config: Any, vocab_size: int, count: int) -> list[int]:
    """Return ``count`` token ids without a special meaning to the model: no padding, end or image placeholder."""
    special: set[int] = set()
    for name, value in config.to_dict().items():
        if name.endswith(("token_id", "token_ids", "token_index")):
            special |= {each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)}
    middle = vocab_size // 2
    found = [token for token in range(middle, vocab_size) if token not in special][:count]
    return found + [token for token in range(middle) if token not in special][: count - len(found)]
