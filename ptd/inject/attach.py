"""Attach a prompt to any Hugging Face model, in place, and take it off again."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatchmethod
from typing import Any

import torch
from ptd_kernels import MAX_HEAD_SIZE, available_backends
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptd.inject.attention import IMPLEMENTATION, LayerSlot, give_slot, has_slot, packed_forward, take_slot
from ptd.types import BackboneShape, LayerShape, PrefixKV, PromptEncoder, UserError

ATTENTION_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


DECODERS = "use a decoder such as llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, gpt2, gpt_neox, opt or mixtral"


def check_supported(model_class: type[PreTrainedModel] | None, config: Any) -> None:
    """Refuse a model family the prefix cannot reach, before its weights are loaded.

    Raises `UserError` naming the family and what is supported.
    """
    model_type = config.model_type
    if model_class is None:
        raise UserError(
            f"backbone.path: model type {model_type!r} has no causal language model in transformers; " + DECODERS
        )
    if not model_class._can_set_attn_implementation():
        raise UserError(
            f"backbone.path: model type {model_type!r} does not use transformers' AttentionInterface, so a prefix "
            f"cannot be injected; {DECODERS}"
        )
    foreign = set(getattr(config.get_text_config(), "layer_types", None) or []) - ATTENTION_LAYER_TYPES
    if foreign:
        raise UserError(
            f"backbone.path: model type {model_type!r} has layers without softmax attention "
            f"({', '.join(sorted(foreign))}); a prefix of keys and values exists only in attention layers"
        )


class Attachment:
    """A prompt on a model.

    `set` gives every attention layer its keys and values (the tensors are used as they are, with their autograd
    history). With an ``encoder`` the prompt is encoded anew in every forward pass that records gradients, and kept as
    long as its parameters are unchanged otherwise. Own tokens are shifted by P positions, as PEFT does.
    """

    def __init__(self, model: PreTrainedModel, *, backend: str = "auto", encoder: PromptEncoder | None = None) -> None:
        check_supported(type(model), model.config)
        if backend not in ("auto", *available_backends()):
            known = ", ".join(["auto", *available_backends()])
            raise UserError(f"backbone.attention: there is no backend {backend!r}; available: {known}")
        layers = _attention_layers(model)
        _check_free_and_causal(model, layers)
        self.model = model
        self.encoder = encoder
        self.num_virtual_tokens = 0
        self._previous: str = model.config._attn_implementation
        self._encoded_at: tuple[int, ...] | None = None
        self._packed_token: Any = None
        model.set_attn_implementation(IMPLEMENTATION)
        self.slots = [give_slot(module, backend) for module in layers]
        base = _innermost_model(model, layers)
        self._hooks = [
            base.register_forward_pre_hook(self._before, with_kwargs=True),
            base.register_forward_hook(self._after, always_call=True),
        ]

    @singledispatchmethod
    def set(self, state: Any) -> None:
        """Use ``state`` from now on; None removes the prompt."""
        raise TypeError(f"no injection for a prompt of type {type(state).__name__}")

    @set.register
    def _(self, state: PrefixKV) -> None:
        self.num_virtual_tokens = state.num_virtual_tokens
        for slot, key, value in zip(self.slots, state.keys, state.values, strict=True):
            slot.key, slot.value = key, value

    @set.register
    def _(self, state: None) -> None:
        self.num_virtual_tokens = 0
        for slot in self.slots:
            slot.key = slot.value = None

    def remove(self) -> None:
        """Restore the model as it was before."""
        for hook in self._hooks:
            hook.remove()
        for module in _attention_layers(self.model):
            take_slot(module)
        self.model.set_attn_implementation(self._previous)

    def _encode(self) -> None:
        assert self.encoder is not None
        version = tuple(parameter._version for parameter in self.encoder.parameters())
        if torch.is_grad_enabled() or version != self._encoded_at:
            self.set(self.encoder.state(self.encoder()))
            self._encoded_at = None if torch.is_grad_enabled() else version

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self.encoder is not None:
            self._encode()
        if kwargs.get("cu_seq_lens_q") is not None:
            self._packed_token = packed_forward.set(True)
        if self.num_virtual_tokens:
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = _default_positions(self.model.config.model_type, args, kwargs)
            kwargs = {**kwargs, "position_ids": positions + self.num_virtual_tokens}
        return args, kwargs

    def _after(self, *_: Any) -> None:
        if self._packed_token is not None:
            packed_forward.reset(self._packed_token)
            self._packed_token = None


def _attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        if "Attention" in type(module).__name__ and isinstance(getattr(module, "layer_idx", None), int):
            found.setdefault(module.layer_idx, module)
    expected = model.config.get_text_config().num_hidden_layers
    if sorted(found) != list(range(expected)):
        raise UserError(
            f"{type(model).__name__} has {expected} layers but an attention module with a layer index was found "
            f"in {len(found)} of them; a prefix cannot be injected into this model"
        )
    return [found[index] for index in range(expected)]


def _check_free_and_causal(model: PreTrainedModel, layers: list[nn.Module]) -> None:
    if any(has_slot(module) for module in layers):
        raise UserError("this model carries a prompt already; remove() it first")
    if not all(getattr(module, "is_causal", True) for module in layers):
        raise UserError(
            f"backbone.path: model type {model.config.model_type!r} is an encoder (its attention sees later tokens); "
            + DECODERS
        )


def _innermost_model(model: PreTrainedModel, layers: list[nn.Module]) -> nn.Module:
    """The smallest model around all attention layers: the one that turns positions into embeddings and masks.

    Heads may call past ``base_model`` (OPT calls its decoder directly), never past this one.
    """
    around: list[nn.Module] = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and set(layers) <= set(module.modules())
    ]
    return around[-1]


def _default_positions(model_type: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The positions the model itself would choose when none are given."""
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs["inputs_embeds"]
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    seen = cache.get_seq_length() if cache is not None else 0
    if model_type in POSITIONS_FROM_MASK and mask is not None and mask.ndim == 2:
        counted: Tensor = mask.long().cumsum(1) - 1
        return counted.clamp(min=0)[:, seen:]
    return torch.arange(seen, seen + tokens.shape[1], device=tokens.device)[None]


POSITIONS_FROM_MASK = {"biogpt", "opt"}
"""Families that count positions over unmasked tokens instead of from the left edge."""


@torch.no_grad()
def measure_shape(attachment: Attachment, run: Callable[..., Any]) -> BackboneShape:
    """The backbone's geometry as its own forward pass shows it: each layer's keys and values of one token.

    ``run`` is the callable model (under ZeRO-3 every rank must call this together).
    """
    config = attachment.model.config.get_text_config()
    device = next(attachment.model.parameters()).device
    for slot in attachment.slots:
        slot.probing = True
    try:
        run(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    finally:
        for slot in attachment.slots:
            slot.probing = False
    layers = tuple(_measured(slot) for slot in attachment.slots)
    return BackboneShape(config.model_type, config.hidden_size, config.vocab_size, context_of(config), layers)


def _measured(slot: LayerSlot) -> LayerShape:
    if slot.measured is None:
        raise UserError("a layer of this backbone never called the attention interface; a prefix cannot be injected")
    if max(slot.measured.key_dim, slot.measured.value_dim) > MAX_HEAD_SIZE:
        raise UserError(
            f"a layer of this backbone has heads of size {slot.measured.key_dim}; attention with a prefix takes up to "
            f"{MAX_HEAD_SIZE}"
        )
    return slot.measured


def context_of(config: Any) -> int | None:
    """Positions the backbone was built for; None where its config does not say."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return None
