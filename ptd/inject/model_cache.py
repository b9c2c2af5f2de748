"""A prefix in the model's own cache of keys and values, for models whose attention ptd cannot replace.

The model finds the prefix in ``past_key_values``, expanded over the rows of the batch, as if it had read P tokens
before the text (Li & Liang 2021; PEFT does the same). No attention code is replaced, so this works for every family
whose cache is a list of keys and values. It costs more than ptd's attention: every row gets a copy of the prefix, each
layer concatenates it with the row's own keys, and rows are padded. A sliding window treats the prefix as text: tokens
beyond the window do not see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from ptd.inject.attention import LayerSlot
from ptd.types import LayerShape, UserError

WINDOWS = ("sliding_window", "attention_window_size", "window_size", "attention_chunk_size", "local_attention")
"""Settings that name a window, for families whose cache does not show it (GPT-Neo)."""
_MAY_READ = "_can_checkpoint_with_cache"


class _ReadOnlyLayer(DynamicLayer):
    """A layer's prefix ``[B, H, P, D]``: `update` returns it with the own keys and values behind it, and stores none.

    Gradient checkpointing runs a layer twice, so the second run must not find what the first has stored.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.was_read = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.was_read = True
        keys, values = self.keys.to(key_states.dtype), self.values.to(value_states.dtype)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class PrefixCache:
    """Puts the prefix of ``slots``, one per layer of the model's cache, into the cache of each forward pass."""

    def __init__(self, model: PreTrainedModel, slots: list[LayerSlot]) -> None:
        self.model, self.slots = model, slots
        self._layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._reading: list[_ReadOnlyLayer] = []

    @property
    def count(self) -> int:
        """Number of virtual tokens; 0 without a prefix."""
        key = self.slots[0].key if self.slots else None
        return key.shape[0] if isinstance(key, Tensor) else 0

    def put_into(self, kwargs: dict[str, Any], rows: int) -> None:
        """Put the prefix into the cache of a pass over ``rows`` rows that have no cached tokens yet.

        A pass that records gradients, or that needs no cache afterwards, reads the prefix without storing keys.
        """
        cache = kwargs.get("past_key_values")
        recording = torch.is_grad_enabled()
        if cache is not None and recording and self._checkpoints():
            raise UserError(
                "gradient checkpointing runs each layer twice, so a pass that records gradients cannot fill a cache; "
                "call the model without past_key_values, or under torch.no_grad()"
            )
        if cache is None and (recording or kwargs.get("use_cache") is False):
            self._reading = [_ReadOnlyLayer(*pair) for pair in self._expanded(rows)]
            kwargs["past_key_values"] = Cache(layers=list(self._reading))
            for layer in self._layers:  # checkpointed layers drop any other cache
                setattr(layer, _MAY_READ, True)
            return
        if cache is None:
            cache = kwargs["past_key_values"] = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        dtype = self.model.dtype
        for index, (key, value) in enumerate(self._expanded(rows)):
            cache.update(key.to(dtype), value.to(dtype), index)

    def taken_from(self, output: Any) -> None:
        """End the pass with this output; None: it failed. Raises `UserError` if a layer has not read its prefix."""
        reading, self._reading = self._reading, []
        if not reading:
            return
        for layer in self._layers:
            vars(layer).pop(_MAY_READ, None)
        if output is None:
            return
        missed = [index for index, layer in enumerate(reading) if not layer.was_read]
        if missed:
            raise UserError(
                f"{type(self.model).__name__} did not read the prefix from its cache in layers "
                f"{', '.join(map(str, missed))}, so these layers ran without it; with gradient checkpointing, set "
                "backbone.gradient_checkpointing: false or update transformers, otherwise use method prompt"
            )
        if output.get("past_key_values") is not None:
            output.past_key_values = None  # it holds the prefix only, and cannot be continued

    def _checkpoints(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())

    def _expanded(self, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield keys and values ``[B, H, P, D]``. They keep their precision, in which autograd sums over the rows."""
        for slot in self.slots:
            if isinstance(slot.key, Tensor) and isinstance(slot.value, Tensor):
                key, value = (each.transpose(0, 1).expand(rows, -1, -1, -1) for each in (slot.key, slot.value))
                yield key, value


@contextmanager
def states_in_cache(model: PreTrainedModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield a list to which every pass appends each layer's keys ``[S, H, Dk]`` and values ``[S, H, Dv]``, row 0's."""
    seen: list[tuple[Tensor, Tensor]] = []
    cache = DynamicCache()

    def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cache.layers.clear()
        return args, {**kwargs, "past_key_values": cache, "use_cache": True}

    def end(module: Any, args: Any, output: Any) -> None:
        for layer in cache.layers:
            assert layer.keys is not None
            assert layer.values is not None
            seen.append((layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)))

    hooks = [model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def cached_layers(cache: Any, tokens: int) -> tuple[LayerShape, ...] | str:
    """Return the layers of a cache after one row of ``tokens``; if it cannot hold a prefix, the reason as text."""
    if cache is None:
        return "it has no cache of keys and values"
    if isinstance(cache, EncoderDecoderCache):  # Megatron-BERT makes one even without an encoder
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache):
        return f"its cache is a {type(cache).__name__} instead of one list of keys and values"
    found = []
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"its cache holds more than the keys and values of each token ({type(layer).__name__})"
        key, value = layer.keys, layer.values
        if key is None or value is None or key.shape[:3] != value.shape[:3] or key.shape[2] != tokens:
            return "some of its layers cache no keys and values of their own"
        found.append(LayerShape(key.shape[1], key.shape[3], value.shape[3], "decoder"))
    return tuple(found) or "it has no cache of keys and values"


def window_of(config: Any) -> int | None:
    """Return the smallest window that the text model's config names, in tokens; None: it names none."""
    text = config.get_text_config()
    windows = [getattr(text, name, None) for name in WINDOWS]
    return min((window for window in windows if isinstance(window, int) and window > 0), default=None)


def said_at_start(model: PreTrainedModel, why: str, no_prefix: str | None, *, padded: bool) -> str:
    """Return what a run gets whose model keeps its own attention code, and why.

    ``no_prefix``: why the model takes no prefix, if so. ``padded``: rows could otherwise be packed.
    """
    name = type(model).__name__
    why = why.removeprefix("backbone.path: ").split("; ")[0]
    named = why if name in why or why[:1].isupper() else f"{name} {why}"
    begin = f"{named}; ptd leaves its attention as it is: " if why else ""
    rows = ", and rows are padded, not packed" if padded else ""
    if no_prefix is not None:
        return f"{begin}no prefix can be attached ({no_prefix}){rows}"
    window = window_of(model.config)
    clipped = "" if window is None else f"; tokens further than its window of {window} from the prefix do not see it"
    return (
        f"{begin}a prefix goes through the model's own cache, which is slower than ptd's attention: every row gets a "
        f"copy of it{rows}{clipped}"
    )
