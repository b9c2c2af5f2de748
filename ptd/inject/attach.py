"""Attach a prompt to any Hugging Face model, in place, and take it off again."""

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
from ptd.inject.head import Head
from ptd.inject.inputs import Inputs
from ptd.inject.probe import layer_shapes, probe, shape_of
from ptd.inject.self_check import SelfCheck, Verdict
from ptd.inject.stack import Stack, stacks_of
from ptd.inject.tail import Tail, Watch
from ptd.types import Batch, NoPrompt, PrefixKV, PromptEncoder, SoftTokens, UserError

ATTENTION_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
WRONG_UPSTREAM = {"moshi": "transformers itself generates other tokens with a cache than without, beyond its window"}
"""Families that no check at attach finds out, and why they are refused."""
_WARNING = "warn_if_padding_and_no_attention_mask"
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
    if model_type in WRONG_UPSTREAM:
        raise UserError(
            f"backbone.path: model type {model_type!r} is refused: {WRONG_UPSTREAM[model_type]}; {SUPPORTED}"
        )
    if not model_class._can_set_attn_implementation():
        raise UserError(
            f"backbone.path: model type {model_type!r} computes attention (or what it has instead) without "
            f"transformers' AttentionInterface, through which ptd attaches every kind of prompt; {SUPPORTED}"
        )
    foreign = set(getattr(config.get_text_config(), "layer_types", None) or []) - ATTENTION_LAYER_TYPES
    if foreign:
        raise UserError(
            f"backbone.path: model type {model_type!r} has layers without softmax attention "
            f"({', '.join(sorted(foreign))}), whose state ptd cannot keep apart for each row; {SUPPORTED}"
        )


class Attachment:
    """A prompt on a model.

    `set` gives every attention layer its keys and values, or the embedding layer its virtual tokens (the tensors are
    used as they are, with their autograd history). With an ``encoder`` the prompt is encoded anew in every forward pass
    that records gradients, and kept as long as its parameters are unchanged otherwise. Own tokens are shifted by P
    positions, as PEFT does, in models that take positions.

    Attaching runs a forward pass over a few tokens, which shows the attention layers and their sizes (``shape``), and
    short ones through the first layers, which prove that the model computes with ptd's attention what it computes with
    its own (`ptd.inject.self_check`); ``verdict`` says what it cannot do. Under ZeRO-3 every rank has to attach
    together, and ``forget_passes`` is called before passes that run other modules than those before. Raises `UserError`
    for a model that a prompt cannot be attached to, with the reason.
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
            raise UserError("this model carries a prompt already; remove() it first")
        if any(parameter.device.type == "meta" for parameter in model.parameters()):
            raise UserError(
                "weights of this model lie on the device meta: a device_map has offloaded them, or none were loaded; "
                "load the model onto devices as a whole, or use ptd train with backbone.sharding and backbone.offload"
            )
        self.model = model
        self.encoder = encoder
        self.head = Head(None)
        self.stacks: list[Stack] = []
        self.verdict = Verdict()
        self.extra_positions = 0
        self._encoded_at: tuple[int, ...] | None = None
        self._previous = {module: module.config._attn_implementation for module in _models(model)}
        self._use(IMPLEMENTATION)
        try:
            with Watch(model) as watch:
                calls, output = probe(model)
            modules = [call.module for call in calls]
            self.stacks = stacks_of(model, modules, self._refresh)
            layers = layer_shapes(model, calls, self.stacks)
            self.head = Head(watch.head_of(output))
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
                f"backbone.path: {type(model).__name__} does not run as ptd runs it, on a few tokens of text: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.shape = shape_of(model, layers, self.stacks[0])

    @property
    def packable(self) -> bool:
        """Whether rows can be packed: concatenated into one, kept apart by their boundaries alone."""
        return self.verdict.packed is None

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
    def _without_masks(self) -> Iterator[None]:
        """Passes in which every layer goes by its own rule (causal, window) and the packing.

        Transformers would look for packing in the positions, and many families for padding among the tokens, to warn of
        it: each time they would wait for the GPU to have seen them.
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
            slot.key, slot.value = key, value

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
            slot.key = slot.value = None
        for stack in self.stacks:
            stack.soft, stack.in_front, stack.source_extra = None, False, 0

    def run(self, batch: Batch) -> Any:
        """The model's output for a batch on its device. Without masks where every layer's own rule says it all."""
        inputs = self.inputs.of(batch, self.first_position)
        self.stacks[0].trusted = True
        padded = padded_forward.set((batch.source or batch).has_padding)
        try:
            if "attention_mask" in inputs or not self.packable:
                return self.model(**inputs)
            with self._without_masks():
                return self.model(**inputs)
        finally:
            padded_forward.reset(padded)
            self.stacks[0].trusted = False

    @contextmanager
    def any_backend(self) -> Iterator[None]:
        """With the backend that suits each pass: the one that a run asks for may take packed batches only."""
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
        """For passes over a sequence of text by the model alone, by any backend; takes the prompt off.

        The list is what each attention layer attends to: ``[S, H, Dk]`` and ``[S, H, Dv]`` in the order of
        ``shape.layers``, with S the tokens that the layer's keys come from; of several passes one after the other.
        """
        self.set(None)
        with self.any_backend(), states_of_layers() as seen:
            yield seen

    def generation_inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """What ``model.generate`` has to be given for prompts ``[B, S]``, padded on the left.

        Of a model that takes positions also these: left to itself transformers counts them from 0 in every family.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "position_ids" in self.inputs.names and not self.model.config.is_encoder_decoder:
            inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0) + self.first_position
        return inputs

    def remove(self) -> None:
        """Restore the model as it was before."""
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
                f"method.name: {type(self.model).__name__} cannot be given {what}, because {obstacle}; use another "
                "method, or a backbone of another family"
            )

    def _use(self, implementation: str | None) -> None:
        """Attention by this implementation; None: by the one that the model came with."""
        for module, previous in self._previous.items():
            module.config._attn_implementation = implementation or previous

    def shift(self, count: int) -> None:
        """Move own tokens by ``count`` positions, in models that take positions."""
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


def _unasked(*args: Any) -> None:
    """In place of a warning that there may be padding, of which ptd knows whether there is."""


def _models(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]
