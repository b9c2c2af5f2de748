"""What a kernel for one segment of keys is asked (`Need`, `Rule`) and how it answers (`Kernel`). Legend: problem.py.

Forward: ``(q, k, v, rule) -> out, lse``. Backward: ``(dout, q, k, v, out, lse, rule) -> dq, dk, dv``, where out and lse
may be those of a softmax over *more* keys than k: the gradients are then the exact share of these keys in the whole
(FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2, reads nothing but out and lse of the forward pass). ``lse``
must be finite there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.problem import nvidia_capability

HALF = (torch.bfloat16, torch.float16)


class Rule(NamedTuple):
    """Which keys of the segment query row i sees: keys j with ``i + offset - window < j <= i + offset``, if `mask`
    allows them too; `bias` is added to their scores. No offset: no such bound. `cu_seqlens` (with equally many queries
    and keys): own sequence only; `sequences`, the number of the sequence of each row and of each key, says the same to
    kernels without packing."""

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
    """What is known of a segment when its kernel is chosen.

    `keys`: those of the call that has the fewest, where a segment takes several.
    `exact_keys`: dk and dv must be summed over the queries, and over the query heads of a group, in fp32 even if q is
    half precision; FlashAttention-2 rounds each head's sum to q's dtype.
    """

    q: Tensor
    keys: int
    value_head_size: int
    rule: Rule
    exact_keys: bool = False


class Gradients(NamedTuple):
    """Of one segment's queries, keys and values, in the kernel's dtype."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Kernel:
    """`refuses` says why a need is out of reach, or None. `max_rows` (batch, heads, keys, has a bound other than plain
    causal, or a bias) is how many query rows one call should get; None: all rows of all packed sequences at once."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Rule], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Rule], Gradients]
    refuses: Callable[[Need], str | None]
    max_rows: Callable[[int, int, int, bool], int] | None


def refuses_on_gpu(need: Need, *, different_values: bool = False, softcap: bool = False) -> str | None:
    """Why none of the GPU libraries' flash kernels takes this, or None. They differ in `different_values` (may the
    values' head size differ from the keys'?) and `softcap`."""
    q, rule = need.q, need.rule
    capability = nvidia_capability(q.device)
    if capability is None:
        return f"it needs an NVIDIA GPU, the tensors are on {q.device}"
    if capability < (8, 0):
        return "it needs compute capability 8.0 or more"
    if q.dtype not in HALF:
        return f"it computes in fp16 and bf16, not in {q.dtype}"
    if rule.mask is not None or rule.bias is not None:
        return "it takes no mask or bias (hidden rows would have no defined log-sum-exp)"
    if rule.softcap is not None and not softcap:
        return "it has no softcap"
    if q.shape[3] != need.value_head_size and not different_values:
        return "it needs the same head size for keys and values"
    if q.shape[3] % 8 or need.value_head_size % 8:
        return "it needs head sizes that are multiples of 8"
    if need.exact_keys:
        return "it rounds the keys' gradient of each query head to q's dtype"
    return None


def visible_keys(rows: int, keys: int, rule: Rule, device: torch.device) -> Tensor | None:
    """``[rows, keys]`` bool of the rule without its mask, or None if all are visible."""
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
    """The library kernels read the last axis as contiguous without checking, and return garbage if it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def lengths(q: Tensor, k: Tensor, rule: Rule) -> tuple[Tensor | None, int, int]:
    """cu_seqlens, or None, and the longest sequence of queries and of keys, as the flash kernels ask for them."""
    if rule.cu_seqlens is None:
        return None, q.shape[2], k.shape[2]
    longest = q.shape[2] if rule.max_seqlen is None else rule.max_seqlen
    return rule.cu_seqlens, longest, longest


def to_flash_layout(x_BHSX: Tensor, packed: bool) -> Tensor:
    """``[B, S, H, X]``, packed ``[S, H, X]``."""
    x_BSHX = unit_stride(x_BHSX).transpose(1, 2)
    return x_BSHX[0] if packed else x_BSHX


def from_flash_layout(x: Tensor, packed: bool) -> Tensor:
    """The inverse of `to_flash_layout`."""
    return (x[None] if packed else x).transpose(1, 2)
