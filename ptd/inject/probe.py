"""One forward pass that shows a model's attention layers: their order, their sizes and the rule each of them follows.

A layer's rule (causal or not, its window) is read off the mask that the model makes for it. What the module says of
itself is trusted only where there is no mask: NLLB-MoE's decoder layers claim not to be causal.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from ptd_kernels import MAX_HEAD_SIZE
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers import PreTrainedModel

from ptd.inject.attention import Call, Probe, probed
from ptd.inject.stack import Stack, sides_of
from ptd.types import AttentionKind, BackboneShape, LayerShape, UserError

FAR = 1_000_000
"""A position behind every window, from which a mask's rule is looked at."""


@torch.no_grad()
def probe(model: PreTrainedModel) -> tuple[list[Call], Any]:
    """The attention layers in the order of their calls, as the model's own forward pass shows them; its output.

    Under ZeRO-3 every rank has to call this together.
    """
    device = next(model.parameters()).device
    tokens = torch.zeros(1, 3, dtype=torch.long, device=device)
    inputs = {"input_ids": tokens[:, :2], "attention_mask": torch.ones_like(tokens[:, :2])}
    if len(sides_of(model)) == 2:  # an encoder with one token more: that is how cross-attention gives itself away
        inputs = {"input_ids": tokens, "attention_mask": tokens + 1, "decoder_input_ids": tokens[:, :2]}
    seen = Probe()
    token = probed.set(seen)
    try:
        output = model(**inputs)
    finally:
        probed.reset(token)
    return [_as_masked(call) for call in seen.calls], output


def _as_masked(call: Call) -> Call:
    """The call with the rule that its mask shows."""
    if call.mask is None or isinstance(call.mask, FakeTensor) or call.queries < 2:
        return call
    first_query = call.mask.expand(-1, -1, call.queries, -1)[..., 0, 1:]
    seen = first_query if first_query.dtype == torch.bool else first_query > torch.finfo(first_query.dtype).min / 2
    return replace(call, causal=not bool(seen.any()))


def packing_obstacle(call: Call) -> str | None:
    """Why the layer's rule cannot be told to attention without a mask, which is how packed batches run; None: it can.

    A packed batch has no mask: each of its sequences is seen causally (or wholly) and through ``window``.
    """
    if call.mask is None:
        return None
    if call.rule is None:
        return "makes its attention masks itself"
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
    """Of keys from a query: behind it (negative: in front), near and far, and at the window's border."""
    border = [] if window is None else [window - 1, window]
    return [-5000, -1, 0, 1, *border, 511, 5000, FAR]


def _far_off(rule: Any, window: int | None) -> list[bool] | None:
    """Whether a query at `FAR` sees keys at these distances; None where the rule does not say."""
    keys = [FAR - distance for distance in _distances(window)]
    try:
        with unset_fake_temporarily():
            zero, query = torch.tensor(0), torch.tensor(FAR)
            return [bool(rule(zero, zero, query, torch.tensor(key))) for key in keys]
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None


def layer_shapes(model: PreTrainedModel, calls: list[Call], stacks: list[Stack]) -> tuple[LayerShape, ...]:
    """The attention layers in the order of their calls. Raises `UserError` for layers that cannot take a prefix."""
    config, name = model.config.get_text_config(), type(model).__name__
    modules = len({id(call.module) for call in calls})
    if not calls:
        raise UserError(
            f"backbone.path: {name} has no attention layer that calls transformers' AttentionInterface, so no prompt "
            "can be attached to it"
        )
    if modules != len(calls):
        raise UserError(
            f"backbone.path: {name} computes attention {len(calls)} times per forward pass in {modules} modules; a "
            "prefix belongs to one attention per module, so ptd does not support this model"
        )
    if len(stacks) == 1 and len(calls) != config.num_hidden_layers:
        raise UserError(
            f"backbone.path: {name} has {config.num_hidden_layers} layers, of which {len(calls)} compute attention "
            "through transformers' AttentionInterface; ptd supports models all of whose layers do"
        )
    return tuple(_layer(call, within_encoder=call.module in stacks[0].members, two=len(stacks) == 2) for call in calls)


def shape_of(model: PreTrainedModel, layers: tuple[LayerShape, ...], reader: Stack) -> BackboneShape:
    """Plain sizes of the model, whose tokens the stack ``reader`` embeds."""
    config = model.config.get_text_config()
    context = context_of(config)
    context = None if context is None else context - reader.first_position
    width: int = reader.embeddings.embedding_dim
    return BackboneShape(config.model_type, config.hidden_size, config.vocab_size, context, layers, width)


def _layer(call: Call, within_encoder: bool, two: bool) -> LayerShape:
    if max(call.key_dim, call.value_dim) > MAX_HEAD_SIZE:
        raise UserError(
            f"a layer of this backbone has heads of size {call.key_dim}; attention with a prefix takes up to "
            f"{MAX_HEAD_SIZE}"
        )
    kind: AttentionKind = "decoder" if call.causal else "encoder"
    if two:
        kind = "encoder" if within_encoder else "decoder" if call.queries == call.keys else "cross"
    return LayerShape(call.kv_heads, call.key_dim, call.value_dim, kind)


def context_of(config: Any) -> int | None:
    """Positions the backbone was built for; None where its config does not say or its positions are relative.

    Rotary frequencies of type dynamic and longrope change for a whole batch when one of its rows is longer than the
    original context, so that what a row is would depend on its neighbours: there the original context is the limit.
    """
    if hasattr(config, "relative_attention_num_buckets"):
        return None
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    limits = [limit for limit in named if isinstance(limit, int)][:1]
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *(each for each in rope.values() if isinstance(each, dict))):  # one for each type of layer
        original = kind.get("original_max_position_embeddings")
        if kind.get("rope_type") in ("dynamic", "longrope") and isinstance(original, int):
            limits.append(original)
    return min(limits, default=None)


def ordinary_tokens(config: Any, vocab_size: int, count: int) -> list[int]:
    """``count`` token ids that mean nothing special to the model: no padding, no end, no place of an image."""
    special: set[int] = set()
    for name, value in config.to_dict().items():
        if name.endswith(("token_id", "token_ids", "token_index")):
            special |= {each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)}
    middle = vocab_size // 2
    found = [token for token in range(middle, vocab_size) if token not in special][:count]
    return found + [token for token in range(middle) if token not in special][: count - len(found)]
