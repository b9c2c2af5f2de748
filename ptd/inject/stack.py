"""One transformer stack of a model, from its token ids to its last hidden states, with the hooks that ptd adds to it.

A decoder or encoder is one stack; an encoder-decoder has two. The hooks of a stack shift the positions of its tokens,
insert virtual tokens before or among them, remove the virtual tokens from the output, and return only the requested
positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from ptd.inject.attention import LayerSlot, in_this_pass, packed_forward, packing_arguments, padded_forward
from ptd.inject.insertion import first_tokens, interleaved, layout_of_block, mask_with_block
from ptd.inject.last_layer import Tail
from ptd.inject.members import PerSequence
from ptd.inject.model_cache import PrefixCache
from ptd.types import UserError, virtual_id

POSITIONS_FROM_MASK = {"biogpt", "opt"}
"""Families that count positions over unmasked tokens instead of from the left edge."""


class Stack:
    """Hooks on one stack.

    ``shift``: number of positions by which each sequence's own tokens are shifted. ``soft`` ``[P, hidden]``:
    embeddings of virtual tokens, which are inserted before the sequences or replace the ids of `virtual_id`. A sequence
    reads those from ``start`` on, as many as ``size``; None: all of them. ``front``: number inserted before each
    sequence. ``source_front``: the same before the sequences of the other stack, to which this stack attends.
    ``choose`` is called before every forward pass, with its number of sequences, tokens and cache, and sets these.
    ``keep``: flattened positions to return, each given once. ``tail``: modules that run only at these positions.
    ``trusted``: the caller gives the boundaries of packed rows and pads only on the right. ``refresh`` is called before
    every forward pass.
    """

    def __init__(self, module: nn.Module, refresh: Callable[[], None], *, feeds_other: bool = False) -> None:
        self.module, self.refresh = module, refresh
        self.feeds_other = feeds_other
        assert isinstance(module, PreTrainedModel)
        self.embeddings: Any = module.get_input_embeddings()
        self.members = set(module.modules())
        self.parameters = list(inspect.signature(module.forward).parameters)
        self.takes_positions = "position_ids" in self.parameters
        self.keeps_other_states = not feeds_other and "past_key_values" not in self.parameters
        self.first_position = _first_position(module)
        self.slots: dict[int, LayerSlot] = {}  # the number of each of its attention layers, and the layer's slot
        self.choose: Callable[[Stack, int, Tensor, Any], None] = lambda *_: None
        self.shift = PerSequence()
        self.soft: Tensor | None = None
        self.start: PerSequence | None = None
        self.size = PerSequence()
        self.front = PerSequence()
        self.source_front = PerSequence()
        self.inserts = False  # whether any of the prompts has virtual tokens before the sequences
        self.left_obstacle: str | None = None  # why rows must not be padded on the left
        self.packing_obstacle: str | None = None  # why rows must not be packed
        self.trusted = False  # whether the caller gives the boundaries of packed rows
        self.keep: Tensor | None = None  # flattened positions whose hidden states the current pass needs
        self.tail = Tail([])
        self.cache: PrefixCache | None = None  # what puts a prefix into the cache of a model with its own attention
        self._own: Tensor | None = None  # [B, S]: flattened index of each own token among all tokens that ran
        self._ids: Tensor | None = None
        self._packed: Any = None
        self._hooks: list[Any] = []

    def hook(self) -> None:
        self._hooks = [
            self.module.register_forward_pre_hook(self._before, with_kwargs=True),
            self.module.register_forward_hook(self._after, always_call=True),
            self.embeddings.register_forward_pre_hook(self._before_embedding),
            self.embeddings.register_forward_hook(self._after_embedding),
            *self.tail.hooks(),
        ]

    def unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.refresh()
        kwargs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        self._check_padding(kwargs.get("attention_mask"))
        if (self.inserts or self.cached) and not self.trusted and kwargs.get("attention_mask") is None:
            kwargs |= self._packing_by_positions(kwargs)
        if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is None:
            return self._without_tokens(kwargs)
        tokens, bounds = _tokens_of(kwargs), kwargs.get("cu_seq_lens_q")
        sequences = tokens.shape[0] if bounds is None else len(bounds) - 1
        self.choose(self, sequences, tokens, kwargs.get("past_key_values"))
        if bounds is not None:
            self._packed = packed_forward.set(True)
        further = self.front if self.front.most else self.shift
        if further.most and self.takes_positions:
            positions = kwargs.get("position_ids")
            positions = self._default_positions(kwargs) if positions is None else positions
            kwargs["position_ids"] = positions + further.over_tokens(tokens.shape[1], bounds, tokens.device)
        if self.start is not None and kwargs.get("input_ids") is not None:
            kwargs["input_ids"] = self._own_marks(kwargs["input_ids"], bounds)
        if self.front.most:
            kwargs = self._put_in_front(kwargs)
        if self.cached:
            kwargs = self._put_into_cache(self.cached, kwargs)
        mask, source = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if self.source_front.most and source is not None:
            kwargs["encoder_attention_mask"] = self._with_source(mask, source)
        self._begin_tail(kwargs)
        return (), kwargs

    def _without_tokens(self, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Let a pass run that has no tokens for this stack (FSMT's decoder has its own argument). Raises `UserError`
        if a prompt is attached, which such a pass would ignore."""
        if self.soft is not None or self.shift.most or self.inserts or self.cached:
            raise UserError(
                f"{type(self.module).__name__} received neither input_ids nor inputs_embeds, so its prompt has no "
                "place; pass the tokens, or use a backbone of another family"
            )
        return (), kwargs

    @property
    def cached(self) -> int:
        """Number of virtual tokens that this pass reads from the model's own cache."""
        return 0 if self.cache is None else self.cache.count

    @property
    def in_front(self) -> bool:
        """Whether virtual tokens precede the sequences of this pass."""
        return self.front.most > 0

    def _own_marks(self, ids: Tensor, bounds: Tensor | None) -> Tensor:
        """Return the ids with each sequence's virtual tokens numbered as in ``soft``, which has those of all prompts.

        Raises `UserError` for a virtual token that the sequence's prompt does not have; on a GPU, where no value is
        read, its embedding fails instead.
        """
        assert self.soft is not None
        assert self.start is not None
        start, size = (each.over_tokens(ids.shape[1], bounds, ids.device) for each in (self.start, self.size))
        number = virtual_id(0) - ids
        foreign = number >= size
        if ids.device.type == "cpu" and bool(foreign.any()):
            raise UserError(
                "a sequence contains a virtual token that its prompt does not have; fill the template of the prompt "
                "that the sequence reads"
            )
        number = torch.where(foreign, self.soft.shape[0], number + start)
        return torch.where(ids < 0, virtual_id(0) - number, ids)

    def _with_source(self, mask: Tensor | None, source: Tensor) -> Tensor | None:
        """Extend the mask of the other stack's sequences by their virtual tokens, if it lacks them."""
        if mask is None:
            if self.source_front.each is None:
                return None
            mask = source.new_ones(source.shape[0], source.shape[1] - self.source_front.most, dtype=torch.long)
        return mask if mask.shape[1] >= source.shape[1] else mask_with_block(mask, self.source_front, at_end=True)

    def _packing_by_positions(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the boundaries of rows that are packed without explicit boundaries: their positions restart.

        Transformers' masks follow these restarts, and virtual tokens have to be inserted before every packed row. The
        result is empty if no position restarts. Raises `UserError` if the rows cannot be packed.
        """
        positions, cache = kwargs.get("position_ids"), kwargs.get("past_key_values")
        if positions is None or kwargs.get("cu_seq_lens_q") is not None or positions.dim() != 2:
            return {}
        if cache is not None and cache.get_seq_length() > 0:
            return {}
        starts = (positions.diff(dim=1) != 1).nonzero()
        if not len(starts):
            return {}
        if len(positions) != 1 or self.packing_obstacle is not None:
            why = self.packing_obstacle or "the batch has several rows"
            raise UserError(
                f"position_ids restart within a row, as in packed rows, but rows cannot be packed here: {why}; give "
                "each sequence its own row and pad the rows"
            )
        bounds = torch.nn.functional.pad(starts[:, 1] + 1, (1, 1))
        bounds[-1] = positions.shape[1]
        longest = int(bounds.diff().max())
        return packing_arguments(bounds.to(torch.int32), longest)

    def _check_padding(self, mask: Any) -> None:
        # A trusted batch is padded on the right; inspecting its mask would make the host wait for a GPU.
        if self.trusted or self.left_obstacle is None or not isinstance(mask, Tensor) or mask.dim() != 2:
            return
        if in_this_pass(padded_forward) is False:
            return
        if not bool(mask[:, 0].all()):
            raise UserError(
                f"a batch is padded on the left, which gives wrong results on this backbone: {self.left_obstacle}; "
                "give each batch prompts of equal length"
            )

    def _begin_tail(self, kwargs: dict[str, Any]) -> None:
        """Tell the tail which of the tokens that run are read."""
        if not self.tail.modules:
            return
        tokens = _tokens_of(kwargs)
        every_state = kwargs.get("output_hidden_states") or getattr(self.module.config, "output_hidden_states", False)
        if self.keep is None or every_state:
            self.tail.begin(tokens, None)
        else:
            self.tail.begin(tokens, self.keep if self._own is None else self._own.flatten()[self.keep])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._packed is not None:
            packed_forward.reset(self._packed)
            self._packed = None
        if self.cache is not None:
            self.cache.taken_from(output)
        own, keep, self._own = self._own, self.keep, None
        if output is None or (own is None and keep is None):  # None: the pass failed
            return
        hidden: Tensor = output.last_hidden_state
        if own is not None and not self.feeds_other and hidden.shape[1] > 1:  # 1: already cut to the last position
            hidden = hidden.flatten(0, 1)[own]
            if output.get("hidden_states") is not None:
                output.hidden_states = tuple(states.flatten(0, 1)[own] for states in output.hidden_states)
        if keep is not None:
            hidden = hidden.flatten(0, 1)[keep][None]
        output.last_hidden_state = hidden

    def _put_in_front(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Insert virtual tokens directly before the first own token of every sequence.

        They come after padding on the left and not before it, where they could be outside an attention window. If some
        sequences have fewer than others, padding makes the rows equally long: before their virtual tokens, or in the
        encoder of an encoder-decoder at the end, because BART's positions are columns. Such a batch always has a mask.
        In cached generation the cache holds the virtual tokens after the first pass; every pass extends the mask by
        them. Raises `UserError` for masks and caches into which they cannot be inserted.
        """
        assert self.soft is not None
        count, ragged = self.front.most, self.front.each is not None
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if self.keeps_other_states and kwargs.get("use_cache"):
            raise UserError(
                f"{type(self.module).__name__} does not keep its state in past_key_values, so virtual tokens before "
                "the sequences would be read again with every new token; pass use_cache=False"
            )
        if getattr(cache, "is_compileable", False):
            raise UserError(
                "virtual tokens before the sequences need a cache that grows, but this cache has a fixed size; "
                "generate without cache_implementation, or use method prefix, which adds no tokens"
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise UserError(
                f"{type(self.module).__name__} received a mask that is not a 2-dimensional tensor, so virtual tokens "
                "before the sequences cannot be inserted into it; pass a 2-dimensional attention_mask, use the text "
                "model's own checkpoint instead of a multimodal one, or use method prefix, which adds no tokens"
            )
        ids: Tensor | None = kwargs.get("input_ids")
        given: Tensor = kwargs["inputs_embeds"] if ids is None else ids
        rows, columns = given.shape[:2]
        seen = cache.get_seq_length() if cache is not None else 0
        if seen > 0:
            self._check_cache(count, seen, columns, mask, kwargs.get("position_ids"))
        if kwargs.get("cu_seq_lens_q") is not None and not seen:
            return self._put_in_front_of_packed(kwargs)
        at_end = self.feeds_other
        if ragged and not at_end and self.left_obstacle is not None:
            raise UserError(
                "the prompts of a batch have different numbers of virtual tokens, so rows would be padded on the left, "
                f"which gives wrong results on this backbone: {self.left_obstacle}; use prompts of equal length"
            )
        if ragged and mask is None:
            mask = given.new_ones(rows, columns + max(0, seen - count), dtype=torch.long)
        if mask is not None:
            kwargs["attention_mask"] = mask_with_block(mask, self.front, at_end=at_end)
        if seen > 0:
            return kwargs
        if cache is not None and mask is not None and not bool(mask.any(dim=1).all()):
            raise UserError(
                "the first pass over the prompts has a row that contains only padding, as with prefill_chunk_size in a "
                "batch padded on the left, so the row's virtual tokens have no place; generate without "
                "prefill_chunk_size, give each batch prompts of equal length, or use method prefix"
            )
        column_P = torch.arange(count, device=self.soft.device)
        first_B = column_P.new_zeros(rows) if mask is None else first_tokens(mask)
        between_B = self.front.tensor(rows, column_P.device) if at_end else torch.full_like(first_B, count)
        places_BT = layout_of_block(first_B, columns, count, between_B)
        column_S = torch.arange(columns, device=column_P.device)
        begin_B1 = (columns + count) * torch.arange(rows, device=column_P.device)[:, None]
        self._own = begin_B1 + column_S + between_B[:, None] * (column_S >= first_B[:, None])
        numbers_BP = self._numbers(column_P, rows, between_B)
        if ids is not None:
            block = torch.where(numbers_BP < 0, 0, virtual_id(0) - numbers_BP)
            kwargs["input_ids"] = interleaved(ids, block, places_BT)
        else:
            soft = torch.where((numbers_BP < 0)[..., None], 0.0, embedding(numbers_BP.clamp(min=0), self.soft))
            both = torch.cat([soft.expand(rows, -1, -1).to(given.dtype), given], dim=1)
            kwargs["inputs_embeds"] = both.gather(1, places_BT[..., None].expand(-1, -1, given.shape[-1]))
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = interleaved(kwargs["token_type_ids"], torch.zeros_like(column_P), places_BT)
        if kwargs.get("position_ids") is not None:
            own = kwargs["position_ids"].expand(*kwargs["position_ids"].shape[:-2], rows, columns)
            begin = own.gather(-1, first_B[:, None].expand(*own.shape[:-1], 1)) - between_B[:, None]
            before = begin + column_P
            kwargs["position_ids"] = interleaved(own, before.clamp(min=0) if ragged else before, places_BT)
        return kwargs

    def _numbers(self, column_P: Tensor, rows: int, between_B: Tensor) -> Tensor:
        """Return the number of the virtual token in each column of the rows' blocks, ``[B or 1, P]``; -1 for padding.

        A row's virtual tokens are the last of the first ``between_B`` columns of its block.
        """
        if self.start is None:
            return column_P[None]
        start_B, count_B = (each.tensor(rows, column_P.device) for each in (self.start, self.front))
        place_BP = column_P - (between_B - count_B)[:, None]
        real_BP = (place_BP >= 0) & (place_BP < count_B[:, None])
        return torch.where(real_BP, start_B[:, None] + place_BP, -1)

    def _put_into_cache(self, count: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Put the prefix into the cache, once per sequence, and extend every mask by its ``count`` tokens.

        Raises `UserError` for masks and caches into which the prefix cannot be put.
        """
        assert self.cache is not None
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if getattr(cache, "is_compileable", False):
            raise UserError(
                "a prefix in the model's own cache needs a cache that grows, but this cache has a fixed size; generate "
                "without cache_implementation"
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise UserError(
                f"{type(self.module).__name__} received a mask that is not a 2-dimensional tensor, into which a prefix "
                "in its cache cannot be inserted; pass a 2-dimensional attention_mask, or use method prompt"
            )
        ids: Tensor | None = kwargs.get("input_ids")
        rows, columns = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
        seen = cache.get_seq_length() if cache is not None else 0
        if seen > 0:
            self._check_cache(count, seen, columns, mask, kwargs.get("position_ids"))
        else:
            self.cache.put_into(kwargs, rows)
        if mask is not None:
            kwargs["attention_mask"] = torch.cat([mask.new_ones(rows, count), mask], dim=1)
        return kwargs

    def _check_cache(self, count: int, seen: int, columns: int, mask: Tensor | None, positions: Tensor | None) -> None:
        """Raise `UserError` unless ``columns`` new tokens continue the cache.

        The cache holds ``seen`` tokens, ``count`` of them virtual; ``positions`` include the virtual tokens. For a
        cache from an earlier call, ``generate`` counts the virtual tokens as tokens of the text, and cuts off that
        number of new tokens.
        """
        fits = mask is None or mask.shape[1] + count == seen + columns
        if fits and mask is None and positions is not None and positions.dim() == 2:
            own = count if self.front.each is None else self.front.each[0]
            fits = int(positions[0, 0]) - own - (seen - count) in (0, self.first_position)
        if not fits:
            raise UserError(
                f"the new tokens do not continue the {seen} tokens of the cache, {count} of which are the prompt's "
                "virtual tokens: a cache that was filled without this prompt, or by an earlier generate, cannot be "
                "continued; pass the whole text without past_key_values"
            )

    def _put_in_front_of_packed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        assert self.soft is not None
        bounds: Tensor = kwargs["cu_seq_lens_q"]
        ids: Tensor | None = kwargs.get("input_ids")
        given: Tensor = kwargs["inputs_embeds"] if ids is None else ids
        tokens, sequences, device = given.shape[1], len(bounds) - 1, bounds.device
        inserted = self.front.total(sequences)
        count_B = self.front.tensor(sequences, device)
        through_B = count_B.cumsum(0)  # virtual tokens before the end of each sequence
        row = torch.arange(sequences, device=device)
        row_of_own = torch.repeat_interleave(row, bounds.diff(), output_size=tokens)
        row_of_virtual = torch.repeat_interleave(row, count_B, output_size=inserted)
        number = torch.arange(inserted, device=device)
        within = number - (through_B - count_B)[row_of_virtual]
        own = torch.arange(tokens, device=device) + through_B[row_of_own]
        places = bounds[:-1].long()[row_of_virtual] + number
        new_bounds = bounds + torch.nn.functional.pad(through_B, (1, 0)).to(torch.int32)
        start_B = torch.zeros_like(row) if self.start is None else self.start.tensor(sequences, device)
        which = within + start_B[row_of_virtual]
        self._own = own[None]

        def joined(values: Tensor, virtual: Tensor, dim: int = -1) -> Tensor:
            shape = list(values.shape)
            shape[dim] = tokens + inserted
            return values.new_empty(shape).index_copy(dim, own, values).index_copy(dim, places, virtual)

        if ids is not None:
            kwargs["input_ids"] = joined(ids, (virtual_id(0) - which)[None])
        else:
            kwargs["inputs_embeds"] = joined(given, embedding(which, self.soft).to(given.dtype)[None], dim=1)
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = joined(kwargs["token_type_ids"], torch.zeros_like(places)[None])
        positions = kwargs.get("position_ids")
        if positions is not None:
            begin = positions.index_select(-1, bounds[:-1].long()) - count_B
            kwargs["position_ids"] = joined(positions, begin.index_select(-1, row_of_virtual) + within)
        return kwargs | packing_arguments(new_bounds, kwargs["max_length_q"] + self.front.most)

    def _before_embedding(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.soft is None or args[0].is_floating_point():
            return None
        self._ids = args[0]
        return (args[0].clamp(min=0), *args[1:])

    def _after_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._ids is None:
            # Gradient checkpointing makes it require a gradient, and GIT adds its positions to it in place.
            return output.clone() if output.is_leaf and output.requires_grad else None
        ids, self._ids = self._ids, None
        assert self.soft is not None
        # Look up in the prompt's own precision, so that its gradient is summed over the batch in that precision.
        rows = embedding((virtual_id(0) - ids).clamp(min=0), self.soft)
        return torch.where((ids < 0)[..., None], rows.to(output.dtype), output)

    def _default_positions(self, kwargs: dict[str, Any]) -> Tensor:
        """Return the positions that the model itself would choose when none are given."""
        ids, cache, mask = kwargs.get("input_ids"), kwargs.get("past_key_values"), kwargs.get("attention_mask")
        tokens = kwargs["inputs_embeds"] if ids is None else ids
        seen = cache.get_seq_length() if cache is not None else 0
        if (self.in_front or self.cached) and cache is not None and seen:
            seen -= self.front.most + self.cached
        assert isinstance(self.module, PreTrainedModel)
        if self.module.config.model_type in POSITIONS_FROM_MASK and mask is not None and mask.ndim == 2:
            counted: Tensor = mask.long().cumsum(1) - 1
            return counted.clamp(min=0)[:, -tokens.shape[1] :]
        if self.first_position and ids is not None:
            useful: Tensor = (ids != self.first_position - 1).long()  # the padding index itself
            return useful.cumsum(1) * useful + (self.first_position - 1)
        # The length of a static cache is a number on the device.
        return torch.arange(tokens.shape[1], device=tokens.device)[None] + (seen + self.first_position)


def stacks_of(model: PreTrainedModel, attention: list[nn.Module], refresh: Callable[[], None]) -> list[Stack]:
    """Return the stacks of a model in the order in which they run."""
    sides = sides_of(model)
    if len(sides) == 2:
        encoder, decoder = (
            _innermost_model(side, [layer for layer in attention if layer in set(side.modules())]) for side in sides
        )
        return [Stack(encoder, refresh, feeds_other=True), Stack(decoder, lambda: None)]
    return [Stack(_innermost_model(model, attention), refresh)]


def sides_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the encoder and decoder of a model that has both, else the model itself."""
    for module in model.modules():
        encoder, decoder = getattr(module, "encoder", None), getattr(module, "decoder", None)
        if isinstance(encoder, PreTrainedModel) and isinstance(decoder, PreTrainedModel):
            return [encoder, decoder]
    return [model]


def _innermost_model(model: nn.Module, layers: list[nn.Module]) -> nn.Module:
    """Return the smallest model around all attention layers: it turns positions into embeddings and masks.

    A head may bypass ``base_model`` (OPT's head calls its decoder directly), but never this model.
    """
    around: list[nn.Module] = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and set(layers) <= set(module.modules())
    ]
    return around[-1]


def _first_position(module: nn.Module) -> int:
    """Return 0, or in the RoBERTa family the position after the padding index."""
    for part in module.modules():
        if hasattr(part, "create_position_ids_from_input_ids"):
            return int(part.padding_idx) + 1  # type: ignore[arg-type]
    return 0


def _tokens_of(kwargs: dict[str, Any]) -> Tensor:
    """Return the token ids of a pass, ``[B, S]``; of given embeddings, their first numbers."""
    ids: Tensor | None = kwargs.get("input_ids")
    return kwargs["inputs_embeds"][..., 0] if ids is None else ids
