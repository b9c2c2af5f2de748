"""The package flash-attn-4 (flash_attn.cute, for Hopper and Blackwell), with native packing. Never run so far.

On Hopper it sums dQ by atomics, so reruns differ in the last bits. Legend of shapes: problem.py.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.problem import nvidia_capability
from ptd_kernels.prefix_attention.segments.kernel import (
    Gradients,
    Kernel,
    Need,
    Rule,
    from_flash_layout,
    lengths,
    refuses_on_gpu,
    to_flash_layout,
)

_HEAD_SIZES = (64, 96, 128)


@functools.cache
def _library() -> tuple[Any, str | None]:
    """Return flash_attn.cute.interface, or the reason why it cannot be used."""
    try:
        library = importlib.import_module("flash_attn.cute.interface")
        functions = library._flash_attn_fwd, library._flash_attn_bwd
    except (ImportError, AttributeError) as error:
        return None, f"the package flash-attn-4 cannot be imported ({error})"
    if any("max_seqlen_q" not in inspect.signature(function).parameters for function in functions):
        return None, "this flash-attn-4 is too old: its forward or backward has no parameter max_seqlen_q; upgrade it"
    return library, None


def _bounds(q: Tensor, k: Tensor, rule: Rule) -> dict[str, Any]:
    """Return the offsets and the longest length of the packed sequences as keyword arguments.

    Without that length, the kernel assumes that each sequence is as long as the whole pack.
    """
    cu_seqlens, max_q, max_k = lengths(q, k, rule)
    if cu_seqlens is None:
        return {}
    return {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": max_q, "max_seqlen_k": max_k}


def _forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    packed = rule.cu_seqlens is not None
    tensors = [to_flash_layout(x, packed) for x in (q, k, v)]
    out, lse = _library()[0]._flash_attn_fwd(
        *tensors, softmax_scale=rule.scale, causal=rule.offset is not None, return_lse=True, **_bounds(q, k, rule)
    )[:2]
    # Rows without a key (more queries than keys) must not count.
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    return from_flash_layout(out, packed), lse[None] if packed else lse


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule) -> Gradients:
    packed = rule.cu_seqlens is not None
    dout, q_, k_, v_, out = (to_flash_layout(x, packed) for x in (dout, q, k, v, out))
    sums = (lse[0] if packed else lse).contiguous()
    gradients = _library()[0]._flash_attn_bwd(
        q_, k_, v_, out, dout, sums, softmax_scale=rule.scale, causal=rule.offset is not None, **_bounds(q, k, rule)
    )[:3]
    return Gradients(*(from_flash_layout(x, packed) for x in gradients))


def _refuses(need: Need) -> str | None:
    if (reason := refuses_on_gpu(need)) is not None:
        return reason
    capability = nvidia_capability(need.q.device)
    if capability is None or capability[0] not in (9, 10):
        return "it supports only Hopper and Blackwell (compute capability 9.x and 10.x)"
    if need.q.shape[3] not in _HEAD_SIZES:
        return f"it supports only the head sizes {', '.join(map(str, _HEAD_SIZES))}"
    if need.rule.window is not None:
        return "its backward does not support a window on every architecture"
    return _library()[1]


FLASH_ATTN_4 = Kernel("flash-attn 4", _forward, _backward, _refuses, max_rows=None)
