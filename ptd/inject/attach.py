"""Attach a prompt to any Hugging Face model in place, and remove it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import singledispatchmethod
from itertools import accumulate
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ptd.inject.attention import (
    IMPLEMENTATION,
    MASKLESS,
    WRITTEN_OUT,
    LayerSlot,
    give_slot,
    has_slot,
    occupy,
    padded_forward,
    states_of_layers,
    take_slot,
)
from ptd.inject.explain import CACHE, check_backend, obstacle_to_several
from ptd.inject.inputs import Inputs
from ptd.inject.kernel_check import KernelFault, backend_of_any_pass
from ptd.inject.last_layer import ModuleProbe, Tail
from ptd.inject.members import PassPrompts, PerSequence, RowsOfPass
from ptd.inject.model_cache import PrefixCache, said_at_start, states_in_cache
from ptd.inject.output_layer import OutputLayer, PassOutput
from ptd.inject.probe import SOFTMAX, cache_shapes, layer_shapes, layer_types, probe, shape_of
from ptd.inject.self_check import SelfCheck, Verdict
from ptd.inject.stack import Stack, stacks_of
from ptd.types import (
    NO_MEMBER,
    Batch,
    LayerShape,
    NoPrompt,
    PrefixKV,
    PromptEncoder,
    Prompts,
    PromptState,
    SoftTokens,
    UserError,
)

WRONG_UPSTREAM = {
    "moshi": "beyond its attention window, transformers itself generates other tokens with a cache than without one"
}
"""Model families with an error that no check at attach time detects, and the reason why they are not supported."""
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
    WRONG_UPSTREAM["doge"] = "before transformers 5.23, padded rows of it get other values than single rows"
_WARNING = "warn_if_padding_and_no_attention_mask"
SUPPORTED = (
    "use a decoder such as llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, gpt2, gpt_neox, opt or mixtral, an "
    "encoder such as bert, roberta, distilbert or modernbert, or an encoder-decoder such as t5, bart or mbart"
)
OTHERS = {"soft": "prompt", "marks": "p_tuning", "prefix": "prefix"}
"""Capability in a `Verdict` -> the method that needs nothing else."""


def check_supported(model_class: type[PreTrainedModel] | None, config: Any) -> None:
    """Raise `UserError` for a model family that is known to be wrong, or unknown, before its weights are loaded.

    The message names the family and families to use instead.
    """
    model_type = config.model_type
    if model_class is None:
        raise UserError(f"backbone.path: transformers has no model of type {model_type!r} for this task; " + SUPPORTED)
    if model_type in WRONG_UPSTREAM:
        raise UserError(
            f"backbone.path: model type {model_type!r} is not supported: {WRONG_UPSTREAM[model_type]}; {SUPPORTED}"
        )


def own_attention(model: PreTrainedModel) -> str | None:
    """Return why a model has to keep its own attention code; None: ptd can replace it."""
    if not model._can_set_attn_implementation():
        return "does not compute attention through transformers' AttentionInterface"
    foreign = layer_types(model.config) - SOFTMAX
    if foreign:
        return f"has layers without softmax attention ({', '.join(sorted(foreign))})"
    return None


class Attachment:
    """A prompt that is attached to a model.

    `set` gives every attention layer its prefix, or the embedding layer its virtual tokens. The tensors are not copied
    and keep their autograd history. With an ``encoder``, every forward pass that records gradients encodes the prompt
    again; the other passes reuse the prompt until the encoder's parameters change. In models that take positions, the
    model's own tokens (those of the text) are shifted by P positions, as in PEFT.

    Several `Prompts` can be attached at once; ``note_on_several``: a note for the user if the attention backend cannot
    compute batches whose sequences read different ones, so that they use another.

    Attaching runs one forward pass over a few tokens, which finds the attention layers and their sizes (``shape``), and
    short passes through the first layers, which verify that the model computes the same with ptd's attention as with
    its own (`ptd.inject.self_check`). ``verdict`` says what the model cannot do. Under ZeRO-3 all ranks have to attach
    at the same time; ``forget_passes`` is called before passes that run other modules than the passes before them.

    A model that cannot take a prefix through ptd's attention keeps its own attention code, and gets the prefix through
    its cache of keys and values (`ptd.inject.model_cache`), or only soft prompts if it has no such cache. ``notice``
    then says so. ``backend`` "cache" chooses this for any model; a backend of `prefix_attention` excludes it.
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
        if not isinstance(model, PreTrainedModel):
            raise UserError(
                f"backbone.path: a {type(model).__name__} is no model of transformers, only a part of one, so it takes "
                f"no prompt; {SUPPORTED}"
            )
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
        self.notice: str | None = None
        self.extra_positions = 0
        self.prompts: tuple[PromptState, ...] = (NoPrompt(),)
        self.members: tuple[int, ...] | None = None  # the prompt of each sequence; None: all read the only prompt
        self.note_on_several: str | None = None
        self._rows = RowsOfPass()
        self.layers: tuple[LayerShape, ...] = ()
        self.slots: list[LayerSlot] = []
        self._encoded_at: tuple[int, ...] | None = None
        self._forget_passes = forget_passes
        self._guard: Any = None
        self._previous = {module: module.config._attn_implementation for module in _models(model)}
        self._connect(backend)
        no_prefix = None if self.verdict.prefix is None else f"{self.verdict.prefix}; {self._instead()}"
        self.shape = shape_of(model, self.layers, self.stacks[0], no_prefix)

    def _connect(self, backend: str) -> None:
        """Attach through ptd's attention if that takes a prefix, else with the model's own attention."""
        own = None if backend == CACHE else own_attention(self.model)
        if own is not None and backend != "auto":
            raise UserError(
                f"backbone.attention: {type(self.model).__name__} {own}, so the backend {backend!r} cannot replace its "
                f"attention; set attention: auto or {CACHE}"
            )
        refused: UserError | None = None
        without_prefix = ""
        if backend != CACHE and own is None:
            try:
                self._attach(lambda: self._with_attention(backend))
            except UserError as error:
                if backend != "auto" or isinstance(error, KernelFault):
                    raise
                refused = error
            else:
                if backend != "auto" or self.verdict.prefix is None:
                    return
                without_prefix = self.verdict.prefix
                self.remove()
        try:
            self._attach(self._with_own_attention)
        except UserError as error:
            if own is not None or backend == CACHE:
                raise
            if refused is not None:
                raise refused from error
        if without_prefix and self.verdict.prefix is not None:
            self.remove()  # ptd's attention can do more
            self._attach(lambda: self._with_attention(backend))
            return
        why = own or (without_prefix if refused is None else str(refused))
        self.notice = said_at_start(self.model, why, self.verdict.prefix, padded=len(self.stacks) == 1)

    def _attach(self, connect: Callable[[], SelfCheck]) -> None:
        """Find the layers with ``connect``, and check the model. Raises `UserError`."""
        self.stacks, self.verdict, self.head = [], Verdict(), OutputLayer(None)
        self._forget_passes()
        try:
            self.verdict = connect().run()
            self.stacks[0].left_obstacle = self.verdict.left
            self.stacks[0].packing_obstacle = self.verdict.packed
        except BaseException as error:
            self.remove()
            if isinstance(error, UserError) or not isinstance(error, Exception):
                raise
            raise UserError(
                f"backbone.path: {type(self.model).__name__} fails when ptd runs it on a few tokens of text: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _with_attention(self, backend: str) -> SelfCheck:
        """Connect ptd's attention; return the check, which has read what the model computes without it."""
        self._use(IMPLEMENTATION)
        with ModuleProbe(self.model) as watch:
            calls, output = probe(self.model)
        self.stacks = stacks_of(self.model, [call.module for call in calls], self._refresh)
        self.layers = layer_shapes(self.model, calls, self.stacks)
        self.head = OutputLayer(watch.head_of(output, self.stacks[-1].members))
        self.stacks[-1].tail = Tail(watch.behind_attention(self.stacks[-1].members))
        self.slots = [
            give_slot(call, backend, cross=layer.kind == "cross")
            for call, layer in zip(calls, self.layers, strict=True)
        ]
        for stack in self.stacks:
            stack.choose = self._choose
            stack.slots = {
                number: slot
                for number, (call, slot) in enumerate(zip(calls, self.slots, strict=True))
                if call.module in stack.members
            }
        self._note_on_several(backend, self.layers[0].key_dim)
        bidirectional = any(layer.kind == "encoder" for layer in self.layers)
        self.inputs = Inputs(self.model, self.stacks[0], sees_padding=bidirectional)
        check = SelfCheck(self, calls)
        self._forget_passes()
        self._use(WRITTEN_OUT)
        check.read_plain()
        self._use(IMPLEMENTATION)
        self._hook()
        return check

    def _with_own_attention(self) -> SelfCheck:
        """Connect the model's cache, and leave its attention as it is; return the check."""
        with ModuleProbe(self.model) as watch:
            found, output = cache_shapes(self.model)
        self.stacks = stacks_of(self.model, [self.model.get_input_embeddings()], self._refresh)
        self.layers = () if isinstance(found, str) else found
        self.head = OutputLayer(watch.head_of(output, self.stacks[-1].members))
        self.slots = [LayerSlot(CACHE) for _ in self.layers]
        for stack in self.stacks:
            stack.choose = self._choose
        reader = self.stacks[-1]
        reader.slots = dict(enumerate(self.slots))
        reader.cache = PrefixCache(reader.module, self.slots)
        occupy(self.model)
        self.inputs = Inputs(self.model, self.stacks[0], sees_padding=True)
        check = SelfCheck(self, [], no_prefix=found if isinstance(found, str) else None)
        self._forget_passes()
        if self.model._can_set_attn_implementation():
            self._use(WRITTEN_OUT)
        check.read_plain()
        self._use(None)
        self._hook()
        self._guard = self.model.register_forward_pre_hook(_refuse_packed, with_kwargs=True)
        return check

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

    def set(self, state: PromptState | Prompts | None) -> None:
        """Use ``state`` from now on; None or `NoPrompt` removes the prompt.

        Of several `Prompts`, the sequences of a pass read those that ``Batch.members`` or `reading` names.
        """
        prompts = state.members if isinstance(state, Prompts) else (NoPrompt() if state is None else state,)
        for prompt in prompts:
            self._check_takes(prompt)
        self.prompts = prompts
        self.extra_positions = max(map(self.positions_of, prompts))
        for slot in self.slots:  # the same tensors may have other values now
            slot.hold(None, None)
        only = PassPrompts.of(prompts, None) if len(prompts) == 1 else PassPrompts(())
        for stack in self.stacks:
            stack.inserts = any(map(_inserted, prompts))
            self._take(stack, only)

    @contextmanager
    def reading(self, members: Sequence[int] | None) -> Iterator[None]:
        """Let the sequences of the passes in this block read these prompts: numbers in `Prompts`, or `NO_MEMBER`.

        ``generate`` may repeat each row (beams, several answers). With gradient checkpointing, the backward pass has
        to come before the next forward pass; it may come after this block. ``members`` None changes nothing. Raises
        `UserError` for a number without a prompt.
        """
        wrong = {*(members or ())} - {NO_MEMBER, *range(len(self.prompts))}
        if wrong:
            raise UserError(f"there are {len(self.prompts)} prompts, numbered from 0; there is no prompt {min(wrong)}")
        before = self.members
        if members is not None:
            self.members = tuple(members)
        try:
            yield
        finally:
            self.members = before

    def positions_of(self, prompt: PromptState) -> int:
        """Return the number of positions that a prompt takes from the context, in addition to its sequences."""
        if isinstance(prompt, SoftTokens):
            return _inserted(prompt)
        moved = not self.replaces_attention or any(stack.takes_positions for stack in self.stacks)
        return prompt.num_virtual_tokens if moved else 0

    def extra_for(self, member: int | None) -> int:
        """Return `positions_of` the prompt with this number; None: of the only prompt, or the most of all prompts."""
        if member is None:
            return self.extra_positions
        return 0 if member == NO_MEMBER else self.positions_of(self.prompts[member])

    def _choose(self, stack: Stack, sequences: int, tokens: Tensor, cache: Any) -> None:
        """Give the stack the prompts that the sequences of its next pass read."""
        if self.members is not None:
            members = self._rows.members(self.members, sequences, tokens, cache)
            self._take(stack, PassPrompts.of(self.prompts, members))
        elif len(self.prompts) > 1:
            raise UserError(
                f"this model has {len(self.prompts)} prompts, and nothing says which of them each sequence reads; name "
                "them, for example with tuned.use([…])"
            )

    def _take(self, stack: Stack, read: PassPrompts) -> None:
        prefixes = [state for state in read.states if isinstance(state, PrefixKV)]
        if prefixes and read.index is not None and not self.replaces_attention:
            raise UserError(
                f"{type(self.model).__name__} keeps its own attention code, and its cache takes one prefix for all "
                "sequences of a batch; run each adapter's rows in batches of their own, or use method prompt"
            )
        index = torch.tensor(read.index) if prefixes and read.index is not None else None
        for layer, slot in stack.slots.items():
            slot.take(prefixes, layer, index)
        stack.shift = read.sizes() if prefixes else PerSequence()
        soft = [state.embeddings for state in read.states if isinstance(state, SoftTokens)]
        inserted = read.per_sequence([_inserted(state) for state in read.states])
        if stack is not self.stacks[0]:
            stack.source_front = inserted
            return
        stack.front, stack.start = inserted, None
        stack.soft = soft[0] if len(soft) == 1 else torch.cat(soft) if soft else None
        if soft and read.index is not None:
            stack.start = read.per_sequence([*accumulate(map(len, soft[:-1]), initial=0)])
            stack.size = read.sizes()

    @singledispatchmethod
    def _check_takes(self, prompt: Any) -> None:
        """Raise `UserError` if the model cannot take this type of prompt."""
        raise TypeError(f"no injection for a prompt of type {type(prompt).__name__}")

    @_check_takes.register
    def _(self, prompt: PrefixKV) -> None:
        self._check_verdict("a prefix", self.verdict.prefix)
        if not len(prompt.keys) == len(prompt.values) == len(self.slots):
            raise ValueError(
                f"a prefix for {len(prompt.keys)} attention layers cannot be attached to a model with {len(self.slots)}"
            )

    @_check_takes.register
    def _(self, prompt: SoftTokens) -> None:
        if prompt.in_front:
            self._check_verdict("virtual tokens before the sequences", self.verdict.soft)
        else:
            self._check_verdict("virtual tokens among those of a sequence", self.verdict.marks)

    @_check_takes.register
    def _(self, prompt: NoPrompt) -> None:
        pass

    def run(self, batch: Batch, wanted: PassOutput | None = None) -> Any:
        """Return the model's output for a batch on its device; with ``wanted`` as `only` explains.

        The model runs without masks if each layer's own rule is sufficient.
        """
        inputs = self.inputs.of(batch, self.first_position)
        ragged = self.ragged(batch.members)
        if ragged and batch.cu_seqlens is None:  # virtual tokens make rows of different lengths
            inputs.setdefault("attention_mask", batch.attention_mask.long())
        self.stacks[0].trusted = True
        try:
            with (
                self.padding_known(ragged or (batch.source or batch).has_padding),
                self.reading(batch.members),
                self.only(wanted),
            ):
                if "attention_mask" in inputs or not self.packable:
                    return self.model(**inputs)
                with self._without_masks():
                    return self.model(**inputs)
        finally:
            self.stacks[0].trusted = False

    def ragged(self, members: Sequence[int] | None) -> bool:
        """Return whether sequences that read these prompts get different numbers of virtual tokens in front.

        ``members`` None: as in `reading`.
        """
        read = (self.members if members is None else members) or ()
        prompts = [None if member == NO_MEMBER else self.prompts[member] for member in read]
        return len({0 if prompt is None else _inserted(prompt) for prompt in prompts}) > 1

    @contextmanager
    def any_backend(self) -> Iterator[None]:
        """Let each pass use a suitable backend: the configured backend may support only packed batches."""
        chosen = [slot.backend for slot in self.slots]
        for slot in self.slots:
            slot.backend = backend_of_any_pass(slot.backend)
        try:
            yield
        finally:
            for slot, backend in zip(self.slots, chosen, strict=True):
                slot.backend = backend

    @property
    def replaces_attention(self) -> bool:
        """Whether attention runs through ptd's function; if not, the model's own cache carries a prefix."""
        return self.stacks[-1].cache is None

    @contextmanager
    def bare(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Remove the prompt, for passes over a sequence of text without a prompt, with any backend.

        Yields a list of the keys ``[S, H, Dk]`` and values ``[S, H, Dv]`` to which each attention layer attends, in the
        order of ``shape.layers``; S is the number of tokens that the layer's keys come from. Several passes append
        their keys and values one after the other.
        """
        self.set(None)
        if not self.replaces_attention and not self.layers:
            yield []
            return
        with self.any_backend(), states_of_layers() if self.replaces_attention else states_in_cache(self.model) as seen:
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

    def generation_inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """Return the arguments of ``model.generate`` for prompts ``[B, S]`` that are padded on the left.

        For a model that takes positions they include ``position_ids``, because otherwise transformers counts positions
        from 0 in every family. A model that caches other states than keys and values generates without a cache.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "position_ids" in self.inputs.names and not self.model.config.is_encoder_decoder:
            inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0) + self.first_position
        if self.stacks[0].keeps_other_states:
            inputs["use_cache"] = False
        return inputs

    def remove(self) -> None:
        """Restore the model to its state before the attachment."""
        self.head.unhook()
        if self._guard is not None:
            self._guard.remove()
        for stack in self.stacks:
            stack.unhook()
        for module in self.model.modules():
            take_slot(module)
        self._use(None)

    def _note_on_several(self, backend: str, head_dim: int) -> None:
        """Let passes with several prefixes use any backend if ``backend`` cannot compute them, and note that."""
        parameter = next(self.model.parameters())
        reason = obstacle_to_several(backend, parameter.device, self.model.dtype, head_dim)
        for slot in self.slots:
            slot.backend_of_several = backend if reason is None else "auto"
        if reason is not None:
            self.note_on_several = (
                f"backbone.attention: batches whose sequences read different prompts use backend auto, because {reason}"
            )

    def _hook(self) -> None:
        self.head.hook()
        for stack in self.stacks:
            stack.hook()

    def _check_verdict(self, what: str, obstacle: str | None) -> None:
        if obstacle is not None:
            name = type(self.model).__name__
            raise UserError(f"method.name: {name} does not support {what}, because {obstacle}; {self._instead()}")

    def _instead(self) -> str:
        """Return what to use instead of a method that the model does not support."""
        works = [name for ability, name in OTHERS.items() if getattr(self.verdict, ability) is None]
        methods = " or ".join(f"method {name}" for name in works) or "a trained head without a prompt (method head)"
        return f"use {methods}, or a backbone of another family"

    def _use(self, implementation: str | None) -> None:
        """Switch to this attention implementation; None: to the model's original one."""
        for module, previous in self._previous.items():
            module.config._attn_implementation = implementation or previous

    def shift(self, count: int) -> None:
        """Shift the model's own tokens by ``count`` positions, in models that take or count positions."""
        moved = not self.replaces_attention or any(stack.takes_positions for stack in self.stacks)
        self.extra_positions = count if moved else 0
        for stack in self.stacks:
            stack.shift = PerSequence(count)

    def _refresh(self) -> None:
        """Encode the prompt again if it is out of date. The first stack calls this before every forward pass."""
        if self.encoder is None:
            return
        version = tuple(parameter._version for parameter in self.encoder.parameters())
        if torch.is_grad_enabled() or version != self._encoded_at:
            self.set(self.encoder.state(self.encoder()))
            self._encoded_at = None if torch.is_grad_enabled() else version


def _inserted(prompt: PromptState) -> int:
    """Return how many virtual tokens a prompt puts before each sequence that reads it."""
    return prompt.num_virtual_tokens if isinstance(prompt, SoftTokens) and prompt.in_front else 0


def _unasked(*args: Any) -> None:
    """Do nothing in place of transformers' warning about possible padding: ptd knows whether there is padding."""


def _refuse_packed(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("cu_seq_lens_q") is not None:
        raise UserError(
            f"{type(model).__name__} keeps its own attention code, which does not keep the rows of a packed batch "
            "separate; give each sequence its own row, pad the rows, and do not pass cu_seq_lens_q"
        )


def _models(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]
