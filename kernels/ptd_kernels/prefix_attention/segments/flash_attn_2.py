"""The package flash-attn (FlashAttention-2; Dao 2023, arXiv:2307.08691), with native packing, window and softcap.

Never run so far. Legend of shapes: problem.py.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

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


@functools.cache
def _library() -> tuple[Any, str | None]:
    """Return flash_attn.flash_attn_interface, or the reason why it cannot be used."""
    try:
        version = importlib.import_module("flash_attn").__version__
        if tuple(int(x) for x in version.split(".")[:2]) < (2, 7):
            return None, f"flash-attn is {version}, but this adapter needs 2.7 or newer"
        return importlib.import_module("flash_attn.flash_attn_interface"), None
    except (ImportError, AttributeError) as error:
        return None, f"the package flash-attn cannot be imported ({error})"


def _options(rule: Rule) -> dict[str, Any]:
    left, right = (-1, -1) if rule.window is None else (rule.window - 1, 0)
    return {
        "dropout_p": 0.0, "softmax_scale": rule.scale, "causal": rule.offset is not None, "window_size_left": left,
        "window_size_right": right, "softcap": rule.softcap or 0.0, "alibi_slopes": None,
    }  # fmt: skip


def _forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    cu_seqlens, max_q, max_k = lengths(q, k, rule)
    packed = cu_seqlens is not None
    tensors = [to_flash_layout(x, packed) for x in (q, k, v)]
    library, _ = _library()
    if packed:
        bounds = (cu_seqlens, cu_seqlens, max_q, max_k)
        out, lse, *_ = library._flash_attn_varlen_forward(*tensors, *bounds, **_options(rule), return_softmax=False)
    else:
        out, lse, *_ = library._flash_attn_forward(*tensors, **_options(rule), return_softmax=False)
    # The kernel returns +inf for rows without a key (more queries than keys).
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    return from_flash_layout(out, packed), lse[None] if packed else lse


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule) -> Gradients:
    cu_seqlens, max_q, max_k = lengths(q, k, rule)
    packed = cu_seqlens is not None
    tensors = [to_flash_layout(x, packed) for x in (dout, q, k, v, out)]
    sums = (lse[0] if packed else lse).contiguous()
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors[1:4]]
    library, _ = _library()
    # Without this option, dQ is summed by atomics.
    options = _options(rule) | {"deterministic": True}
    if packed:
        bounds = (cu_seqlens, cu_seqlens, max_q, max_k)
        library._flash_attn_varlen_backward(*tensors, sums, *gradients, *bounds, **options)
    else:
        library._flash_attn_backward(*tensors, sums, *gradients, **options)
    return Gradients(*(from_flash_layout(x, packed) for x in gradients))


def _refuses(need: Need) -> str | None:
    return refuses_on_gpu(need, softcap=True) or _library()[1]


FLASH_ATTN_2 = Kernel("flash-attn 2", _forward, _backward, _refuses, max_rows=None)
