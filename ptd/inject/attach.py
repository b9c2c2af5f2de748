"""Attach a prompt to any Hugging Face model, in place, and take it off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import singledispatchmethod
from typing import Any

import torch
from ptd_kernels import MAX_HEAD_SIZE
from torch import Tensor
from transformers import PreTrainedModel

from ptd.inject.attention import IMPLEMENTATION, MASKLESS, Call, give_slot, has_slot, probed, take_slot
from ptd.inject.explain import check_backend
from ptd.inject.head import Head
from ptd.inject.stack import Stack, sides_of, stacks_of
from ptd.inject.tail import Tail, Watch
from ptd.types import BackboneShape, LayerShape, NoPrompt, PrefixKV, PromptEncoder, SoftTokens, UserError

ATTENTION_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
SUPPORTED = (
    "use a decoder such as llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, gpt2, gpt_neox, opt or mixtral, an "
    "encoder such as bert, roberta, distilbert or modernbert, or an encoder-decoder such as t5, bart or mbart"
)


def check_supported(model_class: type[PreTrainedModel] | None, config: Any) -> None:
    """Refuse a model family a prompt cannot reach, before its weights are loaded.

    Raises `UserError` naming the family and what is supported.
    """
    model_type = config.model_type
    if model_class is None:
        raise UserError(f"backbone.path: transformers has no model of type {model_type!r} for this task; " + SUPPORTED)
    if not model_class._can_set_attn_implementation():
        raise UserError(
            f"backbone.path: model type {model_type!r} does not use transformers' AttentionInterface, so a prefix "
            f"cannot be injected; {SUPPORTED}"
        )
    foreign = set(getattr(config.get_text_config(), "layer_types", None) or []) - ATTENTION_LAYER_TYPES
    if foreign:
        raise UserError(
            f"backbone.path: model type {model_type!r} has layers without softmax attention "
            f"({', '.join(sorted(foreign))}); a prefix of keys and values exists only in attention layers"
        )


class Attachment:
    """A prompt on a model.

    `set` gives every attention layer its keys and values, or the embedding layer its virtual tokens (the tensors are
    used as they are, with their autograd history). With an ``encoder`` the prompt is encoded anew in every forward pass
    that records gradients, and kept as long as its parameters are unchanged otherwise. Own tokens are shifted by P
    positions, as PEFT does, in models that take positions.

    Attaching runs one forward pass over one or two tokens, which shows the attention layers and their sizes
    (``shape``); under ZeRO-3 every rank has to attach together.
    """

    def __init__(self, model: PreTrainedModel, *, backend: str = "auto", encoder: PromptEncoder | None = None) -> None:
        check_supported(type(model), model.config)
        check_backend(backend)
        if any(has_slot(module) for module in model.modules()):
            raise UserError("this model carries a prompt already; remove() it first")
        self.model = model
        self.encoder = encoder
        self.extra_positions = 0
        self._encoded_at: tuple[int, ...] | None = None
        self._previous = {module: module.config._attn_implementation for module in _models(model)}
        model.set_attn_implementation(IMPLEMENTATION)
        try:
            with Watch(model) as watch:
                calls, output = _probe(model)
            self.stacks = stacks_of(model, [call.module for call in calls], self._refresh)
            self.head = Head(watch.head_of(output))
            self.stacks[-1].tail = Tail(watch.behind_attention(self.stacks[-1].members))
            self.shape = _shape(model, calls, self.stacks)
        except BaseException:
            self._restore()
            raise
        kinds = [layer.kind for layer in self.shape.layers]
        self.slots = [
            give_slot(call.module, backend, cross=kind == "cross") for call, kind in zip(calls, kinds, strict=True)
        ]
        self.packable = len(self.stacks) == 1 and self.stacks[0].takes_positions
        self.packable &= all(call.causal or call.window is None for call in calls)
        kinds_of_layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
        self.own_rules = self.packable and "chunked_attention" not in kinds_of_layers
        self.head.hook()
        for stack in self.stacks:
            stack.hook()

    @property
    def first_position(self) -> int:
        """What the backbone's own positions start from (RoBERTa's begin behind the padding index)."""
        return self.stacks[0].first_position

    def keep(self, positions: Tensor | None, targets: Tensor | None = None) -> None:
        """Put out the last hidden states at these flattened positions only, in the next forward pass.

        Each stands there once; what runs behind the last attention runs for them alone, so with gradient checkpointing
        the backward pass has to come before the next forward pass. With ``targets``, the tokens at these positions, a
        language model whose ``head.fuses`` computes their cross-entropy instead of logits: ``head.take()``.
        """
        self.stacks[-1].keep = positions
        self.head.targets = targets

    @contextmanager
    def without_masks(self) -> Iterator[None]:
        """Passes in which every layer goes by its own rule (causal, window) and the packing, for models with
        ``own_rules``. Transformers would look for packing in the positions, and wait for the GPU to have seen them."""
        for module in self._previous:
            module.config._attn_implementation = MASKLESS
        try:
            yield
        finally:
            for module in self._previous:
                module.config._attn_implementation = IMPLEMENTATION

    @singledispatchmethod
    def set(self, state: Any) -> None:
        """Use ``state`` from now on; None or `NoPrompt` removes the prompt."""
        raise TypeError(f"no injection for a prompt of type {type(state).__name__}")

    @set.register
    def _(self, state: PrefixKV) -> None:
        self.set(None)
        self._shift(state.num_virtual_tokens)
        for slot, key, value in zip(self.slots, state.keys, state.values, strict=True):
            slot.key, slot.value = key, value

    @set.register
    def _(self, state: SoftTokens) -> None:
        self.set(None)
        reader = self.stacks[0]
        reader.soft, reader.in_front = state.embeddings, state.in_front
        if state.in_front:
            self.extra_positions = state.num_virtual_tokens
            for stack in self.stacks[1:]:
                stack.source_extra = state.num_virtual_tokens

    @set.register(type(None))
    @set.register
    def _(self, state: NoPrompt) -> None:
        self._shift(0)
        for slot in self.slots:
            slot.key = slot.value = None
        for stack in self.stacks:
            stack.soft, stack.in_front, stack.source_extra = None, False, 0

    def remove(self) -> None:
        """Restore the model as it was before."""
        self.head.unhook()
        for stack in self.stacks:
            stack.unhook()
        for module in self.model.modules():
            take_slot(module)
        self._restore()

    def _restore(self) -> None:
        for module, implementation in self._previous.items():
            module.config._attn_implementation = implementation

    def _shift(self, count: int) -> None:
        self.extra_positions = count if any(stack.takes_positions for stack in self.stacks) else 0
        for stack in self.stacks:
            stack.shift = count

    def _refresh(self) -> None:
        """Before every forward pass of a stack."""
        if self.encoder is None:
            return
        version = tuple(parameter._version for parameter in self.encoder.parameters())
        if torch.is_grad_enabled() or version != self._encoded_at:
            self.set(self.encoder.state(self.encoder()))
            self._encoded_at = None if torch.is_grad_enabled() else version


def _models(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


@torch.no_grad()
def _probe(model: PreTrainedModel) -> tuple[list[Call], Any]:
    """The attention layers in the order of their calls, as the model's own forward pass shows them; its output."""
    device = next(model.parameters()).device
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    inputs = {"input_ids": tokens[:, :1], "attention_mask": torch.ones_like(tokens[:, :1])}
    if len(sides_of(model)) == 2:  # an encoder of two tokens: that is how cross-attention gives itself away
        inputs = {"input_ids": tokens, "attention_mask": tokens + 1, "decoder_input_ids": tokens[:, :1]}
    calls: list[Call] = []
    token = probed.set(calls)
    try:
        output = model(**inputs)
    finally:
        probed.reset(token)
    return calls, output


def _shape(model: PreTrainedModel, calls: list[Call], stacks: list[Stack]) -> BackboneShape:
    config = model.config.get_text_config()
    seen = {id(call.module) for call in calls}
    expected = config.num_hidden_layers if len(stacks) == 1 else len(calls)
    if len(seen) != len(calls) or len(calls) != expected or not calls:
        raise UserError(
            f"{type(model).__name__} has {expected} attention layers but {len(seen)} of its modules called the "
            "attention interface; a prefix cannot be injected into this model"
        )
    layers = tuple(
        _layer(call, within_encoder=call.module in stacks[0].members, two=len(stacks) == 2) for call in calls
    )
    width: int = stacks[0].embeddings.embedding_dim
    context = context_of(config)
    context = None if context is None else context - stacks[0].first_position
    return BackboneShape(config.model_type, config.hidden_size, config.vocab_size, context, layers, width)


def _layer(call: Call, within_encoder: bool, two: bool) -> LayerShape:
    if max(call.key_dim, call.value_dim) > MAX_HEAD_SIZE:
        raise UserError(
            f"a layer of this backbone has heads of size {call.key_dim}; attention with a prefix takes up to "
            f"{MAX_HEAD_SIZE}"
        )
    if two:
        kind = "encoder" if within_encoder else "decoder" if call.queries == call.keys else "cross"
    else:
        kind = "decoder" if call.causal else "encoder"
    return LayerShape(call.kv_heads, call.key_dim, call.value_dim, kind)  # type: ignore[arg-type]


def context_of(config: Any) -> int | None:
    """Positions the backbone was built for; None where its config does not say or its positions are relative."""
    if hasattr(config, "relative_attention_num_buckets"):
        return None
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return None
