"""The attention function and the mask function that transformers calls instead of its own.

Both are registered under `IMPLEMENTATION` in transformers' ``AttentionInterface`` and ``AttentionMaskInterface``. Every
model family built on these interfaces looks the functions up by name, so the prefix works with gradient checkpointing,
packing and cached generation, and no model code is patched. A layer's prefix is stored in its attention module
(`LayerSlot`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from ptd_kernels import prefix_attention
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ptd.types import PrefixKV, UserError

T = TypeVar("T")
IMPLEMENTATION = "ptd_prefix"
MASKLESS = "ptd_prefix_maskless"
"""The same attention under a name for which transformers makes no masks and does not inspect the positions."""
WRITTEN_OUT = "eager"
"""The attention code in the model family's own file. SDPA, the default of most models, sometimes differs: in some
releases of transformers it omits Gemma 2's softcap and the causal rule of UMT5's decoder."""
_SLOT = "_ptd_slot"

packed_forward: ContextVar[bool] = ContextVar("ptd_packed_forward", default=False)
"""True while a packed batch runs. Its boundaries are passed as ``cu_seq_lens_q``, so no mask is materialised."""
padded_forward: ContextVar[bool | None] = ContextVar("ptd_padded_forward", default=None)
"""Whether the mask of a pass hides anything. None: transformers inspects it, which makes the host wait for a GPU."""


def in_this_pass(variable: ContextVar[T]) -> T | None:
    """Return the variable's value in a pass; None if the pass is compiled: torch.compile cannot read such variables.

    The passes for which they are set (probes, packed batches of ``Attachment.run``) are not compiled as a whole.
    """
    return None if torch.compiler.is_compiling() else variable.get()


def packing_arguments(bounds: Tensor, longest: int) -> dict[str, Any]:
    """Return the arguments that give a model the boundaries of a packed batch.

    ``bounds``: int32 ``[sequences + 1]``; ``longest``: length of the longest sequence.
    """
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


@dataclass
class LayerSlot:
    """A layer's prefix, stored in its attention module: ``key``, ``value`` ``[P, H, D]``; None without a prefix.

    With ``index`` (int64 ``[sequences]``, on the CPU), ``key`` and ``value`` are those of several prefixes, and each
    sequence reads the one that the index names, computed by ``backend_of_several``.

    ``causal``: whether the layer attends causally to its own keys if it gets no mask. ``told``: the argument
    ``is_causal`` with which the model family calls attention; a different argument comes from the caller of the model
    and overrides ``causal``.
    """

    backend: str = "auto"
    cross: bool = False
    causal: bool = True
    told: bool | None = None
    key: Tensor | tuple[Tensor, ...] | None = None
    value: Tensor | tuple[Tensor, ...] | None = None
    index: Tensor | None = None
    backend_of_several: str = "auto"
    _taken: tuple[Tensor, ...] = ()
    _cast: dict[torch.dtype, tuple[Any, Any]] = field(default_factory=dict)

    def hold(self, key: Tensor | None, value: Tensor | None) -> None:
        """Use one prefix, or none. Unless it requires a gradient, it must not be changed in place afterwards."""
        self.key, self.value, self.index, self._taken, self._cast = key, value, None, (), {}

    def take(self, states: Sequence[PrefixKV], layer: int, index: Tensor | None) -> None:
        """Use the keys and values of ``layer`` of the prompts; without ``index``, of the only prompt or of none.

        They must not be changed in place as long as passes take the same ones.
        """
        keys, values = (tuple(state.keys[layer] for state in states), tuple(state.values[layer] for state in states))
        taken = (*keys, *values)
        same = len(taken) == len(self._taken) and (index is None) == (self.index is None)
        if not taken or not same or any(new is not old for new, old in zip(taken, self._taken, strict=True)):
            self.hold(None, None)
            if index is None:
                self.key, self.value = (keys[0], values[0]) if states else (None, None)
            else:  # a prefix without tokens, for the sequences that read none
                self.key, self.value = (*keys, keys[0][:0].detach()), (*values, values[0][:0].detach())
            self._taken = taken
        self.index = index

    def prefix(self, dtype: torch.dtype) -> tuple[Any, Any]:
        """Return ``key`` and ``value`` for queries of ``dtype``: cast in every pass only if they get gradients."""
        key, value = self.key, self.value
        if key is None or value is None:
            return None, None
        if dtype not in self._cast:
            tensors = [each for part in (key, value) for each in (part if isinstance(part, tuple) else (part,))]
            if any(x.requires_grad or x.dtype == dtype for x in tensors) or torch.is_inference_mode_enabled():
                return key, value
            self._cast[dtype] = _in_dtype(key, dtype), _in_dtype(value, dtype)
        return self._cast[dtype]


def _in_dtype(prefix: Tensor | tuple[Tensor, ...], dtype: torch.dtype) -> Tensor | tuple[Tensor, ...]:
    return tuple(each.to(dtype) for each in prefix) if isinstance(prefix, tuple) else prefix.to(dtype)


@dataclass(frozen=True)
class Call:
    """One call of the attention function, as a probe recorded it.

    ``told``: the argument ``is_causal``. ``mask``: the mask that attention received; None: it received none. ``rule``:
    the mask function from which transformers made that mask; None: transformers made no mask.
    """

    module: nn.Module
    queries: int
    keys: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    causal: bool
    told: bool | None
    window: int | None
    softcap: float | None
    mask: Tensor | None
    rule: Callable[..., Tensor] | None


@dataclass
class Probe:
    """Record of a forward pass: attention ``calls`` in order, and ``rules``: each mask with its mask function."""

    calls: list[Call] = field(default_factory=list)
    rules: list[tuple[Tensor, Callable[..., Tensor]]] = field(default_factory=list)

    def rule_of(self, mask: Tensor | None) -> Callable[..., Tensor] | None:
        """Return the mask function from which ``mask`` was made; some families pass on a view of the original mask."""
        memory = None if mask is None else mask.untyped_storage()._cdata
        return next((rule for made, rule in self.rules if made.untyped_storage()._cdata == memory), None)


probed: ContextVar[Probe | None] = ContextVar("ptd_probed", default=None)
"""Set while a probe runs: the probe collects the calls, every layer gets its mask, and attention returns zeros."""


watched: ContextVar[Callable[..., Tensor] | None] = ContextVar("ptd_watched", default=None)
"""If set, called in place of `prefix_attention`, with the layer's slot followed by the arguments of that function."""


@contextmanager
def states_of_layers() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield a list to which every layer appends keys ``[S, H, Dk]`` and values ``[S, H, Dv]`` of the first sequence."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(slot: LayerSlot, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
        seen.append((key[0].transpose(0, 1), value[0].transpose(0, 1)))
        return prefix_attention(query, key, value, *arguments, **options)

    token = watched.set(see)
    try:
        yield seen
    finally:
        watched.reset(token)


def give_slot(call: Call, backend: str, *, cross: bool) -> LayerSlot:
    """Store a slot in the module of a call and return it. The slot is a plain attribute, outside the model's state."""
    slot, module = LayerSlot(backend, cross, call.causal, call.told), call.module
    object.__setattr__(module, _SLOT, slot)
    return slot


def occupy(model: nn.Module) -> None:
    """Mark a model that has a prompt without slots in its attention modules."""
    object.__setattr__(model, _SLOT, None)


def has_slot(module: nn.Module) -> bool:
    """Return whether a prompt is attached to this attention module."""
    return _SLOT in vars(module)


def take_slot(module: nn.Module) -> None:
    """Remove the slot from the module, if it has one."""
    if has_slot(module):
        object.__delattr__(module, _SLOT)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the layer's prefix: ``query`` ``[B, Hq, S, D]`` -> ``[B, S, Hq, Dv]``.

    The signature is that of transformers' attention functions. ``attention_mask``: bool (True: visible) or additive,
    ``[B or 1, Hq or 1, S, T]``. Raises `UserError` for arguments that attention with a prefix does not support.
    """
    if options.get("s_aux") is not None:
        raise UserError(
            f"{type(module).__name__} has attention sinks (s_aux), which attention with a prefix does not support; use "
            "a backbone of another family"
        )
    probe = in_this_pass(probed)
    if probe is not None:
        sizes = query.shape[2], key.shape[2], query.shape[1], key.shape[1], key.shape[3], value.shape[3]
        says = getattr(module, "is_causal", True) if is_causal is None else is_causal
        rule = probe.rule_of(attention_mask)
        probe.calls.append(Call(module, *sizes, says, is_causal, sliding_window, softcap, attention_mask, rule))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    slot: LayerSlot | None = vars(module).get(_SLOT)
    if slot is None:
        raise UserError(
            f"{type(module).__name__} uses the attention implementation {IMPLEMENTATION!r}, but ptd is not attached to "
            "its model; attach a prompt, or set another implementation"
        )
    if dropout:
        raise UserError(
            f"attention dropout is {dropout}, but attention with a prefix does not support dropout; call eval() on the "
            "backbone or set its attention dropout to 0"
        )
    packed = cu_seq_lens_q is not None
    if in_this_pass(packed_forward) and not (packed and attention_mask is None):
        raise UserError(
            f"{type(module).__name__} does not keep the rows of a packed batch separate: it "
            + ("masks them by its own rule" if packed else "does not pass cu_seq_lens_q on to its attention")
            + "; set data.packing: false, or do not pass cu_seq_lens_q"
        )
    causal = slot.causal if is_causal is None or is_causal == slot.told else is_causal
    rows = query.shape[2]
    # T5's relative position bias. In cross-attention this bias is zero, so it is dropped.
    bias: Tensor | None = None if slot.cross else options.get("position_bias")
    if bias is not None:
        bias = bias.detach()  # from frozen weights, but with gradient checkpointing T5 requests its gradient
    masked = attention_mask is not None and not packed
    if attention_mask is not None and attention_mask.shape[2] == 1 < rows:  # one mask for all queries
        attention_mask = attention_mask.expand(-1, -1, rows, -1)
    if attention_mask is not None and attention_mask.is_floating_point():
        if attention_mask.requires_grad:
            raise UserError(
                f"{type(module).__name__} computes a mask from its hidden states and needs the mask's gradient, which "
                "attention with a prefix does not support; use a backbone whose mask depends only on positions"
            )
        bias = attention_mask if bias is None else bias + attention_mask
        attention_mask = None
    if causal and not masked and 1 < rows < key.shape[2]:
        # Without a mask, SDPA's causal rule starts at the first key; the other keys are unused room of a static cache.
        key, value = key[:, :, :rows], value[:, :, :rows]
        bias = None if bias is None else bias[..., :rows]
    prefix_key, prefix_value = slot.prefix(query.dtype)
    watch = in_this_pass(watched)
    attend = prefix_attention if watch is None else partial(watch, slot)
    out = attend(
        query,
        key,
        value,
        _heads_first(prefix_key),
        _heads_first(prefix_value),
        scale=scaling,
        # A mask contains the whole rule (causal, window, padding); without a mask the module's own rule applies. An
        # encoder's window always comes as a mask, unless the window is wider than the sequence.
        causal=causal and not masked,
        window=sliding_window if causal and not masked else None,
        softcap=softcap,
        cu_seqlens=cu_seq_lens_q,
        max_seqlen=max_length_q,
        mask=attention_mask,
        bias=bias,
        prefix_index=slot.index,
        backend=slot.backend if slot.index is None else slot.backend_of_several,
    )
    return out.transpose(1, 2).contiguous(), None


def _heads_first(prefix: Tensor | tuple[Tensor, ...] | None) -> Tensor | list[Tensor] | None:
    """Return ``[H, P, D]`` views of one prefix ``[P, H, D]`` or of several."""
    if isinstance(prefix, tuple):
        return [each.transpose(0, 1) for each in prefix]
    return None if prefix is None else prefix.transpose(0, 1)


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return the mask for `attention_forward`: None for a packed batch, else the same as for SDPA (bool or None)."""
    if in_this_pass(packed_forward):
        return None
    probe, padded = in_this_pass(probed), in_this_pass(padded_forward)
    masked = kwargs.get("attention_mask") is not None
    if masked and padded is False:
        kwargs["attention_mask"] = None
    if probe is not None or (masked and padded):
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    if probe is not None and mask is not None and "mask_function" in kwargs:
        probe.rules.append((mask, kwargs["mask_function"]))
    return mask


for _name in (IMPLEMENTATION, MASKLESS):
    AttentionInterface.register(_name, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, attention_mask)
