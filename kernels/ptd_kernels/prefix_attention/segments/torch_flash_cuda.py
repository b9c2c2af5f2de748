"""torch's own FlashAttention-2 for NVIDIA GPUs, with native packing and window. Never run yet. Legend: problem.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.segments.kernel import (
    Gradients,
    Kernel,
    Rule,
    from_flash_layout,
    lengths,
    refuses_on_gpu,
    to_flash_layout,
)

aten = torch.ops.aten


def _window(rule: Rule) -> dict[str, int | None]:
    if rule.window is None:
        return {"window_size_left": None, "window_size_right": None}
    return {"window_size_left": rule.window - 1, "window_size_right": 0}


def _forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    cu_seqlens, max_q, max_k = lengths(q, k, rule)
    packed = cu_seqlens is not None
    out, lse, *_ = aten._flash_attention_forward(
        *(to_flash_layout(x, packed) for x in (q, k, v)), cu_seqlens, cu_seqlens, max_q, max_k, 0.0,
        rule.offset is not None, False, scale=rule.scale, **_window(rule),
    )  # fmt: skip
    if k.shape[2] == 0 or (rule.offset is not None and rule.offset < 0):  # some row sees no key: the kernel says +inf
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    return from_flash_layout(out, packed), lse[None] if packed else lse


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule) -> Gradients:
    cu_seqlens, max_q, max_k = lengths(q, k, rule)
    packed = cu_seqlens is not None
    # Without dropout the random state is never read.
    no_state = torch.empty(2, dtype=torch.uint64, device=q.device)
    gradients = aten._flash_attention_backward(
        *(to_flash_layout(x, packed) for x in (dout, q, k, v, out)), (lse[0] if packed else lse).contiguous(),
        cu_seqlens, cu_seqlens, max_q, max_k, 0.0, rule.offset is not None, no_state, no_state,
        scale=rule.scale, **_window(rule),
    )  # fmt: skip
    return Gradients(*(from_flash_layout(x, packed) for x in gradients))


TORCH_FLASH_CUDA = Kernel("torch flash (CUDA)", _forward, _backward, refuses_on_gpu, max_rows=None)
