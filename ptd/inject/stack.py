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

from ptd.inject.attention import in_this_pass, packed_forward, packing_arguments, padded_forward
from ptd.inject.last_layer import Tail
from ptd.types import UserError, virtual_id

POSITIONS_FROM_MASK = {"biogpt", "opt"}
"""Families that count positions over unmasked tokens instead of from the left edge."""


class Stack:
    """Hooks on one stack.

    ``shift``: number of positions by which its own tokens are shifted. ``soft`` ``[P, hidden]``: embeddings of virtual
    tokens, which are inserted before every sequence (``in_front``) or replace the ids of `virtual_id`.
    ``source_extra``: number of virtual tokens before the sequences of the other stack, to which this stack attends.
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
        self.first_position = _first_position(module)
        self.shift = 0
        self.soft: Tensor | None = None
        self.in_front = False
        self.source_extra = 0
        self.left_obstacle: str | None = None  # why rows must not be padded on the left
        self.packing_obstacle: str | None = None  # why rows must not be packed
        self.trusted = False  # whether the caller gives the boundaries of packed rows
        self.keep: Tensor | None = None  # flattened positions whose hidden states the current pass needs
        self.tail = Tail([])
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
        front = self.soft.shape[0] if self.soft is not None and self.in_front else 0
        if front and not self.trusted and kwargs.get("attention_mask") is None:
            kwargs |= self._packing_by_positions(kwargs)
        if kwargs.get("cu_seq_lens_q") is not None:
            self._packed = packed_forward.set(True)
        if (front or self.shift) and self.takes_positions:
            positions = kwargs.get("position_ids")
            positions = self._default_positions(kwargs) if positions is None else positions
            kwargs["position_ids"] = positions + (front or self.shift)
        if front:
            kwargs = self._put_in_front(front, kwargs)
        mask, source = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if self.source_extra and mask is not None and source is not None and mask.shape[1] < source.shape[1]:
            kwargs["encoder_attention_mask"] = _with_virtual(mask, self.source_extra)
        self._begin_tail(kwargs)
        return (), kwargs

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
        ids = kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"][..., 0] if ids is None else ids
        every_state = kwargs.get("output_hidden_states") or getattr(self.module.config, "output_hidden_states", False)
        if self.keep is None or every_state:
            self.tail.begin(tokens, None)
        else:
            self.tail.begin(tokens, self.keep if self._own is None else self._own.flatten()[self.keep])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._packed is not None:
            packed_forward.reset(self._packed)
            self._packed = None
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

    def _put_in_front(self, count: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Insert virtual tokens directly before the first own token of every sequence.

        They come after padding on the left and not before it, where they could be outside an attention window. In
        cached generation the cache holds the virtual tokens after the first pass; every pass extends the mask by them.
        Raises `UserError` for masks and caches into which they cannot be inserted.
        """
        assert self.soft is not None
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
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
        if mask is not None:
            kwargs["attention_mask"] = _with_virtual(mask, count)
        ids: Tensor | None = kwargs.get("input_ids")
        given: Tensor = kwargs["inputs_embeds"] if ids is None else ids
        rows, columns = given.shape[:2]
        seen = cache.get_seq_length() if cache is not None else 0
        if seen > 0:
            self._check_cache(count, seen, columns, mask, kwargs.get("position_ids"))
            return kwargs
        if cache is not None and mask is not None and not bool(mask.any(dim=1).all()):
            raise UserError(
                "the first pass over the prompts has a row that contains only padding, as with prefill_chunk_size in a "
                "batch padded on the left, so the row's virtual tokens have no place; generate without "
                "prefill_chunk_size, give each batch prompts of equal length, or use method prefix"
            )
        if kwargs.get("cu_seq_lens_q") is not None:
            return self._put_in_front_of_packed(count, kwargs)
        number = torch.arange(count, device=self.soft.device)
        first_B = number.new_zeros(rows) if mask is None else _first_of(mask)
        places_BT = _places(first_B, columns, count)
        column_S = torch.arange(columns, device=number.device)
        begin_B1 = (columns + count) * torch.arange(rows, device=number.device)[:, None]
        self._own = begin_B1 + column_S + count * (column_S >= first_B[:, None])
        if ids is not None:
            kwargs["input_ids"] = _interleaved(ids, virtual_id(0) - number, places_BT)
        else:
            both = torch.cat([self.soft.expand(rows, -1, -1).to(given.dtype), given], dim=1)
            kwargs["inputs_embeds"] = both.gather(1, places_BT[..., None].expand(-1, -1, given.shape[-1]))
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = _interleaved(kwargs["token_type_ids"], torch.zeros_like(number), places_BT)
        if kwargs.get("position_ids") is not None:
            own = kwargs["position_ids"].expand(*kwargs["position_ids"].shape[:-2], rows, columns)
            begin = own.gather(-1, first_B[:, None].expand(*own.shape[:-1], 1)) - count
            kwargs["position_ids"] = _interleaved(own, begin + number, places_BT)
        return kwargs

    def _check_cache(self, count: int, seen: int, columns: int, mask: Tensor | None, positions: Tensor | None) -> None:
        """Raise `UserError` unless ``columns`` new tokens continue the cache.

        The cache holds ``seen`` tokens, ``count`` of them virtual; ``positions`` include the virtual tokens. For a
        cache from an earlier call, ``generate`` counts the virtual tokens as tokens of the text, and cuts off that
        number of new tokens.
        """
        fits = mask is None or mask.shape[1] + count == seen + columns
        if fits and mask is None and positions is not None and positions.dim() == 2:
            fits = int(positions[0, 0]) - seen in (0, self.first_position)
        if not fits:
            raise UserError(
                f"the new tokens do not continue the {seen} tokens of the cache, {count} of which are the prompt's "
                "virtual tokens: a cache that was filled without this prompt, or by an earlier generate, cannot be "
                "continued; pass the whole text without past_key_values, or use method prefix"
            )

    def _put_in_front_of_packed(self, count: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        assert self.soft is not None
        bounds: Tensor = kwargs["cu_seq_lens_q"]
        ids: Tensor | None = kwargs.get("input_ids")
        given: Tensor = kwargs["inputs_embeds"] if ids is None else ids
        tokens, sequences, device = given.shape[1], len(bounds) - 1, bounds.device
        number = torch.arange(sequences, device=device)
        sequence = torch.repeat_interleave(number, bounds.diff(), output_size=tokens)
        own = torch.arange(tokens, device=device) + count * (sequence + 1)
        new_bounds = bounds + count * torch.arange(sequences + 1, dtype=torch.int32, device=device)
        virtual = torch.arange(count, device=device)
        places = (new_bounds[:-1, None] + virtual).flatten()
        self._own = own[None]

        def joined(values: Tensor, virtual: Tensor, dim: int = -1) -> Tensor:
            shape = list(values.shape)
            shape[dim] = tokens + sequences * count
            return values.new_empty(shape).index_copy(dim, own, values).index_copy(dim, places, virtual)

        if ids is not None:
            kwargs["input_ids"] = joined(ids, (virtual_id(0) - virtual).repeat(sequences)[None])
        else:
            soft = self.soft.expand(sequences, -1, -1).to(given.dtype)
            kwargs["inputs_embeds"] = joined(given, soft.flatten(0, 1)[None], dim=1)
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = joined(kwargs["token_type_ids"], torch.zeros_like(places)[None])
        positions = kwargs.get("position_ids")
        if positions is not None:
            begin = positions.index_select(-1, bounds[:-1].long())[..., None] - count
            kwargs["position_ids"] = joined(positions, (begin + virtual).flatten(-2))
        return kwargs | packing_arguments(new_bounds, kwargs["max_length_q"] + count)

    def _before_embedding(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.soft is None or args[0].is_floating_point():
            return None
        self._ids = args[0]
        return (args[0].clamp(min=0), *args[1:])

    def _after_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._ids is None:
            return None
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
        if self.in_front and cache is not None and seen:
            assert self.soft is not None
            seen -= self.soft.shape[0]
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


def _places(first_B: Tensor, columns: int, count: int) -> Tensor:
    """Return ``[B, P + S]``: for each column of a row, an index into the row's [virtual, own] tokens, concatenated.

    Row b has ``columns`` own tokens and ``count`` virtual tokens before its token ``first_B[b]``.
    """
    column = torch.arange(columns + count, device=first_B.device)
    behind = column - first_B[:, None]
    return torch.where(behind < 0, column + count, torch.where(behind < count, behind, column))


def _interleaved(own: Tensor, virtual: Tensor, places: Tensor) -> Tensor:
    """Return ``own`` ``[…, B, S]`` and ``virtual`` ``[P]`` or ``[…, B, P]`` in the layout of `_places`."""
    both = torch.cat([virtual.to(own.dtype).expand(*own.shape[:-1], virtual.shape[-1]), own], dim=-1)
    return both.gather(-1, places.expand(*both.shape[:-2], *places.shape))


def _first_of(mask: Tensor) -> Tensor:
    """Return the column of the first token of each row, ``[B]``."""
    return mask.bool().int().argmax(dim=1)


def _with_virtual(mask: Tensor, count: int) -> Tensor:
    """Extend the mask ``[B, S]`` to ``[B, P + S]``, by ``count`` virtual tokens before each row's first token."""
    return _interleaved(mask, mask.new_ones(count), _places(_first_of(mask), mask.shape[1], count))
