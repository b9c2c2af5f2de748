"""The attention function and the mask function that transformers calls instead of its own.

Both are registered under `IMPLEMENTATION` in transformers' ``AttentionInterface`` and ``AttentionMaskInterface``, which
every model family built on them consults by name; so gradient checkpointing, packing and cached generation reach the
prefix without any model code being patched. A layer's prefix lies in its attention module (`LayerSlot`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ptd_kernels import prefix_attention
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ptd.types import UserError

IMPLEMENTATION = "ptd_prefix"
MASKLESS = "ptd_prefix_maskless"
"""The same attention under a name that transformers makes no masks for, not even by looking at the positions."""
WRITTEN_OUT = "eager"
"""Attention as the family's own file writes it out. SDPA, which most models come with, is not the same everywhere: in
some releases of transformers it leaves Gemma 2's softcap out, and the causal rule of UMT5's decoder."""
_SLOT = "_ptd_slot"

packed_forward: ContextVar[bool] = ContextVar("ptd_packed_forward", default=False)
"""True while a packed batch runs: its boundaries come as ``cu_seq_lens_q``, so no mask is materialised."""
padded_forward: ContextVar[bool | None] = ContextVar("ptd_padded_forward", default=None)
"""Whether the mask of a pass hides anything; None: transformers looks, and the host waits for a GPU to tell it."""


def packing_arguments(bounds: Tensor, longest: int) -> dict[str, Any]:
    """How a model is told the boundaries of a packed batch: int32 ``[sequences + 1]``, and its longest sequence."""
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


@dataclass
class LayerSlot:
    """What the attention function finds in its module: ``key``, ``value`` ``[P, H, D]``; None without a prefix.

    ``causal``: what holds for the layer's own keys where it is given no mask. ``told``: the argument ``is_causal`` with
    which its family calls attention; another one comes from whoever called the model, and holds.
    """

    backend: str = "auto"
    cross: bool = False
    causal: bool = True
    told: bool | None = None
    key: Tensor | None = None
    value: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What a probe saw of one call of the attention function.

    ``told``: the argument ``is_causal``. ``mask``: the mask it was given; ``rule``: the function of transformers that
    made it; None: there was none.
    """

    module: nn.Module
    queries: int
    keys: int
    kv_heads: int
    key_dim: int
    value_dim: int
    causal: bool
    told: bool | None
    window: int | None
    mask: Tensor | None
    rule: Callable[..., Tensor] | None


@dataclass
class Probe:
    """What a forward pass shows of a model: attention ``calls`` in their order, ``rules``: masks and what made them."""

    calls: list[Call] = field(default_factory=list)
    rules: list[tuple[Tensor, Callable[..., Tensor]]] = field(default_factory=list)

    def rule_of(self, mask: Tensor | None) -> Callable[..., Tensor] | None:
        """What made the mask, of which families hand on a view."""
        memory = None if mask is None else mask.untyped_storage()._cdata
        return next((rule for made, rule in self.rules if made.untyped_storage()._cdata == memory), None)


probed: ContextVar[Probe | None] = ContextVar("ptd_probed", default=None)
"""Set while a probe runs: it collects the calls, every layer is given its mask, and attention puts out zeros."""


watched: ContextVar[Callable[..., Tensor] | None] = ContextVar("ptd_watched", default=None)
"""What stands between a layer and `prefix_attention`, if anything: called with the layer's slot and its arguments."""


@contextmanager
def states_of_layers() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The list that every layer adds its keys ``[S, H, Dk]`` and values ``[S, H, Dv]`` to, of the first sequence."""
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
    """Put a slot into the module of a call (not as a submodule: it is no part of the model's state)."""
    slot, module = LayerSlot(backend, cross, call.causal, call.told), call.module
    object.__setattr__(module, _SLOT, slot)
    return slot


def has_slot(module: nn.Module) -> bool:
    """Whether a prompt is attached to this attention module."""
    return _SLOT in vars(module)


def take_slot(module: nn.Module) -> None:
    """Remove the slot again."""
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
    """transformers' attention signature: ``query`` ``[B, Hq, S, D]`` -> ``[B, S, Hq, Dv]``, with the layer's prefix.

    ``attention_mask``: bool (True: visible) or additive, ``[B or 1, Hq or 1, S, T]``. Raises `UserError` for what
    attention with a prefix cannot compute.
    """
    if options.get("s_aux") is not None:
        raise UserError(f"{type(module).__name__} has attention sinks (s_aux), which attention with a prefix lacks")
    probe = probed.get()
    if probe is not None:
        sizes = query.shape[2], key.shape[2], key.shape[1], key.shape[3], value.shape[3]
        says = getattr(module, "is_causal", True) if is_causal is None else is_causal
        rule = probe.rule_of(attention_mask)
        probe.calls.append(Call(module, *sizes, says, is_causal, sliding_window, attention_mask, rule))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    slot: LayerSlot | None = vars(module).get(_SLOT)
    if slot is None:
        raise UserError(
            f"{type(module).__name__} uses attention {IMPLEMENTATION!r} but ptd is not attached to its model"
        )
    if dropout:
        raise UserError(
            f"attention dropout is {dropout}, but attention with a prefix has none; "
            "put the backbone in eval() or set its attention dropout to 0"
        )
    packed = cu_seq_lens_q is not None
    if packed_forward.get() and not (packed and attention_mask is None):
        raise UserError(
            f"{type(module).__name__} does not keep the rows of a packed batch apart: it "
            + ("masks them by a rule of its own" if packed else "does not hand cu_seq_lens_q on to its attention")
            + "; set data.packing: false, or do not pass cu_seq_lens_q"
        )
    causal = slot.causal if is_causal is None or is_causal == slot.told else is_causal
    rows = query.shape[2]
    # T5's relative position bias; what it gives cross-attention is all zeros.
    bias: Tensor | None = None if slot.cross else options.get("position_bias")
    if bias is not None:
        bias = bias.detach()  # of frozen weights, but under gradient checkpointing T5 asks for its gradient
    masked = attention_mask is not None and not packed
    if attention_mask is not None and attention_mask.shape[2] == 1 < rows:  # the same for every query
        attention_mask = attention_mask.expand(-1, -1, rows, -1)
    if attention_mask is not None and attention_mask.is_floating_point():
        if attention_mask.requires_grad:
            raise UserError(
                f"{type(module).__name__} computes a mask from its hidden states and learns through it, which "
                "attention with a prefix does not support; use a backbone whose mask depends on positions alone"
            )
        bias = attention_mask if bias is None else bias + attention_mask
        attention_mask = None
    if causal and not masked and 1 < rows < key.shape[2]:
        # sdpa_mask counts on SDPA's causal rule, which starts at the first key; the rest is a static cache's free room.
        key, value = key[:, :, :rows], value[:, :, :rows]
        bias = None if bias is None else bias[..., :rows]
    watch = watched.get()
    attend = prefix_attention if watch is None else partial(watch, slot)
    out = attend(
        query,
        key,
        value,
        None if slot.key is None else slot.key.transpose(0, 1),
        None if slot.value is None else slot.value.transpose(0, 1),
        scale=scaling,
        # A mask carries the whole rule (causal, window, padding); without one the module's own rule holds. A window
        # of an encoder always comes as a mask, unless it is wider than the sequence.
        causal=causal and not masked,
        window=sliding_window if causal and not masked else None,
        softcap=softcap,
        cu_seqlens=cu_seq_lens_q,
        max_seqlen=max_length_q,
        mask=attention_mask,
        bias=bias,
        backend=slot.backend,
    )
    return out.transpose(1, 2).contiguous(), None


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask transformers hands to `attention_forward`: none for packed batches, else as for SDPA (bool, or none)."""
    if packed_forward.get():
        return None
    probe, padded = probed.get(), padded_forward.get()
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
