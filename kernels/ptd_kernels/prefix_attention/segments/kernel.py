"""The interface of a kernel for one segment of keys: its input (`Need`, `Rule`) and the kernel (`Kernel`).

Forward: ``(q, k, v, rule) -> out, lse``. Backward: ``(dout, q, k, v, out, lse, rule) -> dq, dk, dv``. In backward, out
and lse may come from a softmax over *more* keys than k; the gradients are then these keys' exact share of the whole
(FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2, reads only out and lse of the forward pass). Backward needs
a finite ``lse``. Legend of shapes: problem.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.problem import nvidia_capability

HALF = (torch.bfloat16, torch.float16)


class Rule(NamedTuple):
    """Which keys of the segment query row i sees: the keys j with ``i + offset - window < j <= i + offset`` that `mask`
    also allows. `bias` is added to their scores. Without `offset` there is no such bound. With `cu_seqlens` (as many
    queries as keys), a row sees only its own sequence. `sequences`, the sequence number of each row and of each key,
    states the same for kernels without packing."""

    scale: float
    softcap: float | None = None
    offset: int | None = None
    window: int | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    sequences: tuple[Tensor, Tensor] | None = None


class Need(NamedTuple):
    """What is known about a segment when its kernel is chosen.

    `keys`: the number of keys; if a segment needs several calls, the number in the call with the fewest keys.
    `exact_keys`: dk and dv must be summed in fp32 over the queries and over the query heads of a group, even if q is in
    half precision; FlashAttention-2 rounds each head's sum to q's dtype.
    """

    q: Tensor
    keys: int
    value_head_size: int
    rule: Rule
    exact_keys: bool = False


Pair: TypeAlias = tuple[Tensor, Tensor]


class Gradients(NamedTuple):
    """Gradients of one segment's queries, keys and values, in the kernel's dtype."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Kernel:
    """A kernel for one segment. `refuses` returns why it cannot meet a need, or None. `max_rows(device, heads, keys,
    bounded)` returns how many query rows one call should get; `bounded` is true if the rule has a bias, or a bound
    other than plain causal. `max_rows` None: one call gets all rows of all packed sequences. `add_backward`, where a
    kernel has it, takes dq of the other segment as a further argument, adds to it in place (None: computes no dq), and
    returns dk and dv."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Rule], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Rule], Gradients]
    refuses: Callable[[Need], str | None]
    max_rows: Callable[[torch.device, int, int, bool], int] | None
    add_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Rule, Tensor | None], Pair] | None = None


def refuses_on_gpu(need: Need, *, different_values: bool = False, softcap: bool = False) -> str | None:
    """Return why a GPU library's flash kernel cannot meet this need, or None. The libraries differ in whether they
    support a head size of the values other than that of the keys (`different_values`), and a softcap (`softcap`)."""
    q, rule = need.q, need.rule
    capability = nvidia_capability(q.device)
    if capability is None:
        return f"it needs an NVIDIA GPU, but the tensors are on {q.device}"
    if capability < (8, 0):
        return "it needs compute capability 8.0 or higher"
    if q.dtype not in HALF:
        return f"it computes in fp16 and bf16, not in {q.dtype}"
    if rule.mask is not None or rule.bias is not None:
        return "it supports no mask or bias (the log-sum-exp of a fully hidden row would be undefined)"
    if rule.softcap is not None and not softcap:
        return "it supports no softcap"
    if q.shape[3] != need.value_head_size and not different_values:
        return "it needs the same head size for keys and values"
    if q.shape[3] % 8 or need.value_head_size % 8:
        return "it needs head sizes that are multiples of 8"
    if need.exact_keys:
        return "it rounds each query head's gradient of the keys to q's dtype"
    return None


def visible_keys(rows: int, keys: int, rule: Rule, device: torch.device) -> Tensor | None:
    """Return the rule without its mask as bool ``[rows, keys]``, or None if all keys are visible."""
    if rule.offset is None and rule.sequences is None:
        return None
    row_S1, key_T = torch.arange(rows, device=device)[:, None], torch.arange(keys, device=device)
    visible = torch.ones(rows, keys, dtype=torch.bool, device=device)
    if rule.offset is not None:
        visible = key_T <= row_S1 + rule.offset
        if rule.window is not None:
            visible &= key_T > row_S1 + (rule.offset - rule.window)
    if rule.sequences is not None:
        row_sequence, key_sequence = rule.sequences
        visible &= row_sequence[:, None] == key_sequence
    return visible


def unit_stride(x: Tensor) -> Tensor:
    """Return `x` with stride 1 in its last axis: the library kernels assume it unchecked, and else return garbage."""
    return x if x.stride(-1) == 1 else x.contiguous()


def lengths(q: Tensor, k: Tensor, rule: Rule) -> tuple[Tensor | None, int, int]:
    """Return cu_seqlens (or None) and the longest sequence of queries and of keys, as the flash kernels need them."""
    if rule.cu_seqlens is None:
        return None, q.shape[2], k.shape[2]
    longest = q.shape[2] if rule.max_seqlen is None else rule.max_seqlen
    return rule.cu_seqlens, longest, longest


def to_flash_layout(x_BHSX: Tensor, packed: bool) -> Tensor:
    """Return ``[B, S, H, X]``; if packed, ``[S, H, X]``."""
    x_BSHX = unit_stride(x_BHSX).transpose(1, 2)
    return x_BSHX[0] if packed else x_BSHX


def from_flash_layout(x: Tensor, packed: bool) -> Tensor:
    """Undo `to_flash_layout`."""
    return (x[None] if packed else x).transpose(1, 2)


def split_keys(both: Tensor, k_HPD: Tensor, v_HPE: Tensor) -> Pair:
    """Return views ``[H, P, D]`` and ``[H, P, E]`` of a flat tensor with dk ``[P, H, D]``, then dv ``[P, H, E]``."""
    H, P, _ = k_HPD.shape
    dk, dv = both.split_with_sizes([k_HPD.numel(), v_HPE.numel()])
    return dk.view(P, H, -1).transpose(0, 1), dv.view(P, H, -1).transpose(0, 1)
