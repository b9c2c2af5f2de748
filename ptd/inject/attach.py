"""Attach a prompt to any Hugging Face model in place, and remove it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import singledispatchmethod
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptd.inject.attention import (
    IMPLEMENTATION,
    MASKLESS,
    WRITTEN_OUT,
    give_slot,
    has_slot,
    padded_forward,
    states_of_layers,
    take_slot,
)
from ptd.inject.explain import check_backend
from ptd.inject.inputs import Inputs
from ptd.inject.last_layer import ModuleProbe, Tail
from ptd.inject.output_layer import OutputLayer, PassOutput
from ptd.inject.probe import layer_shapes, probe, shape_of
from ptd.inject.self_check import SelfCheck, Verdict
from ptd.inject.stack import Stack, stacks_of
from ptd.types import Batch, NoPrompt, PrefixKV, PromptEncoder, SoftTokens, UserError

ATTENTION_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
WRONG_UPSTREAM = {
    "moshi": "beyond its attention window, transformers itself generates other tokens with a cache than without one"
}
"""Model families with an error that no check at attach time detects, and the reason why they are not supported."""
_WARNING = "warn_if_padding_and_no_attention_mask"
SUPPORTED = (
    "use a decoder such as llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, gpt2, gpt_neox, opt or mixtral, an "
    "encoder such as bert, roberta, distilbert or modernbert, or an encoder-decoder such as t5, bart or mbart"
)


def check_supported(model_class: type[PreTrainedModel] | None, config: Any) -> None:
    """Raise `UserError` for a model family that a prompt cannot reach, before its weights are loaded.

    The message names the family and the supported families.
    """
    model_type = config.model_type
    if model_class is None:
        raise UserError(f"backbone.path: transformers has no model of type {model_type!r} for this task; " + SUPPORTED)
    if model_type in WRONG_UPSTREAM:
        raise UserError(
            f"backbone.path: model type {model_type!r} is not supported: {WRONG_UPSTREAM[model_type]}; {SUPPORTED}"
        )
    if not model_class._can_set_attn_implementation():
        raise UserError(
            f"backbone.path: model type {model_type!r} does not compute attention through transformers' "
            f"AttentionInterface, which ptd needs to attach any kind of prompt; {SUPPORTED}"
        )
    foreign = set(getattr(config.get_text_config(), "layer_types", None) or []) - ATTENTION_LAYER_TYPES
    if foreign:
        raise UserError(
            f"backbone.path: model type {model_type!r} has layers without softmax attention "
            f"({', '.join(sorted(foreign))}), whose state ptd cannot keep separate for each row; {SUPPORTED}"
        )


class Attachment:
    """A prompt that is attached to a model.

    `set` gives every attention layer its prefix, or the embedding layer its virtual tokens. The tensors are not copied
    and keep their autograd history. With an ``encoder``, every forward pass that records gradients encodes the prompt
    again; the other passes reuse the prompt until the encoder's parameters change. In models that take positions, the
    model's own tokens (those of the text) are shifted by P positions, as in PEFT.

    Attaching runs one forward pass over a few tokens, which finds the attention layers and their sizes (``shape``), and
    short passes through the first layers, which verify that the model computes the same with ptd's attention as with
    its own (`ptd.inject.self_check`). ``verdict`` says what the model cannot do. Under ZeRO-3 all ranks have to attach
    at the same time; ``forget_passes`` is called before passes that run other modules than the passes before them.
    Raises `UserError`, with the reason, for a model to which a prompt cannot be attached.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        backend: str = "auto",
        encoder: PromptEncoder | None = None,
        forget_passes: Callable[[], None] = lambda: None,
    ) -> None:
        check_supported(type(model), model.config)
        check_backend(backend)
        if any(has_slot(module) for module in model.modules()):
            raise UserError(
                "this model already has a prompt; first call remove() on what ptd.attach or ptd.load returned for it"
            )
        if any(parameter.device.type == "meta" for parameter in model.parameters()):
            raise UserError(
                "weights of this model are on the device meta: a device_map offloaded them, or none were loaded; "
                "load all weights onto real devices, or use ptd train with backbone.sharding and backbone.offload"
            )
        self.model = model
        self.encoder = encoder
        self.head = OutputLayer(None)
        self.stacks: list[Stack] = []
        self.verdict = Verdict()
        self.extra_positions = 0
        self._encoded_at: tuple[int, ...] | None = None
        self._previous = {module: module.config._attn_implementation for module in _models(model)}
        self._use(IMPLEMENTATION)
        try:
            with ModuleProbe(model) as watch:
                calls, output = probe(model)
            modules = [call.module for call in calls]
            self.stacks = stacks_of(model, modules, self._refresh)
            layers = layer_shapes(model, calls, self.stacks)
            self.head = OutputLayer(watch.head_of(output))
            self.stacks[-1].tail = Tail(watch.behind_attention(self.stacks[-1].members))
            self.slots = [
                give_slot(call, backend, cross=layer.kind == "cross") for call, layer in zip(calls, layers, strict=True)
            ]
            self.inputs = Inputs(model, self.stacks[0], sees_padding=any(layer.kind == "encoder" for layer in layers))
            check = SelfCheck(self, calls)
            forget_passes()
            self._use(WRITTEN_OUT)
            check.read_plain()
            self._use(IMPLEMENTATION)
            self._hook()
            self.verdict = check.run()
            self.stacks[0].left_obstacle = self.verdict.left
            self.stacks[0].packing_obstacle = self.verdict.packed
        except BaseException as error:
            self.remove()
            if isinstance(error, UserError) or not isinstance(error, Exception):
                raise
            raise UserError(
                f"backbone.path: {type(model).__name__} fails when ptd runs it on a few tokens of text: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.shape = shape_of(model, layers, self.stacks[0])

    @property
    def packable(self) -> bool:
        """Whether rows can be packed: concatenated into one row and separated only by their boundaries."""
        return self.verdict.packed is None

    @property
    def first_position(self) -> int:
        """First position that the backbone itself uses (RoBERTa's comes after the padding index)."""
        return self.stacks[0].first_position

    @contextmanager
    def only(self, wanted: PassOutput | None) -> Iterator[None]:
        """Let the forward pass in this block compute only what is ``wanted``; None: everything.

        The modules after the last attention run only for the wanted positions, so with gradient checkpointing the
        backward pass has to come before the next forward pass.
        """
        self.stacks[-1].keep = None if wanted is None else wanted.positions
        self.head.wanted = wanted
        try:
            yield
        finally:
            self.stacks[-1].keep = self.head.wanted = None

    @contextmanager
    def _without_masks(self) -> Iterator[None]:
        """Run passes without masks, in which only each layer's own rule (causal, window) and the packing apply.

        Otherwise transformers looks for packing in the positions, and many families look for padding among the tokens
        to warn about it. Both make the host wait for the GPU.
        """
        self._use(MASKLESS)
        for module in self._previous:
            setattr(module, _WARNING, _unasked)
        try:
            yield
        finally:
            for module in self._previous:
                delattr(module, _WARNING)
            self._use(IMPLEMENTATION)

    @singledispatchmethod
    def set(self, state: Any) -> None:
        """Use ``state`` from now on; None or `NoPrompt` removes the prompt."""
        raise TypeError(f"no injection for a prompt of type {type(state).__name__}")

    @set.register
    def _(self, state: PrefixKV) -> None:
        self._check_takes("a prefix", self.verdict.prefix)
        self.set(None)
        self.shift(state.num_virtual_tokens)
        for slot, key, value in zip(self.slots, state.keys, state.values, strict=True):
            slot.hold(key, value)

    @set.register
    def _(self, state: SoftTokens) -> None:
        if state.in_front:
            self._check_takes("virtual tokens before the sequences", self.verdict.soft)
        else:
            self._check_takes("virtual tokens among those of a sequence", self.verdict.marks)
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
        self.shift(0)
        for slot in self.slots:
            slot.hold(None, None)
        for stack in self.stacks:
            stack.soft, stack.in_front, stack.source_extra = None, False, 0

    def run(self, batch: Batch, wanted: PassOutput | None = None) -> Any:
        """Return the model's output for a batch on its device; with ``wanted`` as `only` explains.

        The model runs without masks if each layer's own rule is sufficient.
        """
        inputs = self.inputs.of(batch, self.first_position)
        self.stacks[0].trusted = True
        try:
            with self.padding_known((batch.source or batch).has_padding), self.only(wanted):
                if "attention_mask" in inputs or not self.packable:
                    return self.model(**inputs)
                with self._without_masks():
                    return self.model(**inputs)
        finally:
            self.stacks[0].trusted = False

    @contextmanager
    def any_backend(self) -> Iterator[None]:
        """Let each pass use a suitable backend: the configured backend may support only packed batches."""
        chosen = [slot.backend for slot in self.slots]
        for slot in self.slots:
            slot.backend = "auto"
        try:
            yield
        finally:
            for slot, backend in zip(self.slots, chosen, strict=True):
                slot.backend = backend

    @contextmanager
    def bare(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Remove the prompt, for passes over a sequence of text without a prompt, with any backend.

        Yields a list of the keys ``[S, H, Dk]`` and values ``[S, H, Dv]`` to which each attention layer attends, in the
        order of ``shape.layers``; S is the number of tokens that the layer's keys come from. Several passes append
        their keys and values one after the other.
        """
        self.set(None)
        with self.any_backend(), states_of_layers() as seen:
            yield seen

    @contextmanager
    def padding_known(self, padded: bool) -> Iterator[None]:
        """Run passes of which the caller knows whether masks hide anything (``padded``).

        Otherwise transformers inspects the mask in every pass, for every generated token, and the host waits for it.
        """
        token = padded_forward.set(padded)
        try:
            yield
        finally:
            padded_forward.reset(token)

    def generation_inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return the arguments of ``model.generate`` for prompts ``[B, S]`` that are padded on the left.

        For a model that takes positions they include ``position_ids``, because otherwise transformers counts positions
        from 0 in every family.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "position_ids" in self.inputs.names and not self.model.config.is_encoder_decoder:
            inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0) + self.first_position
        return inputs

    def remove(self) -> None:
        """Restore the model to its state before the attachment."""
        self.head.unhook()
        for stack in self.stacks:
            stack.unhook()
        for module in self.model.modules():
            take_slot(module)
        self._use(None)

    def _hook(self) -> None:
        self.head.hook()
        for stack in self.stacks:
            stack.hook()

    def _check_takes(self, what: str, obstacle: str | None) -> None:
        if obstacle is not None:
            raise UserError(
                f"method.name: {type(self.model).__name__} does not support {what}, because {obstacle}; use another "
                "method, or a backbone of another family"
            )

    def _use(self, implementation: str | None) -> None:
        """Switch to this attention implementation; None: to the model's original one."""
        for module, previous in self._previous.items():
            module.config._attn_implementation = implementation or previous

    def shift(self, count: int) -> None:
        """Shift the model's own tokens by ``count`` positions, in models that take positions."""
        self.extra_positions = count if any(stack.takes_positions for stack in self.stacks) else 0
        for stack in self.stacks:
            stack.shift = count

    def _refresh(self) -> None:
        """Encode the prompt again if it is out of date. The first stack calls this before every forward pass."""
        if self.encoder is None:
            return
        version = tuple(parameter._version for parameter in self.encoder.parameters())
        if torch.is_grad_enabled() or version != self._encoded_at:
            self.set(self.encoder.state(self.encoder()))
            self._encoded_at = None if torch.is_grad_enabled() else version


def _unasked(*args: Any) -> None:
    """Do nothing in place of transformers' warning about possible padding: ptd knows whether there is padding."""


def _models(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]
