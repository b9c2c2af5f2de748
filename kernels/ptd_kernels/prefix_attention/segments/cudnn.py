"""cuDNN's attention, through torch's operators. Never run so far. Legend of shapes: problem.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.segments.kernel import Gradients, Kernel, Need, Rule, refuses_on_gpu, unit_stride

aten = torch.ops.aten
_MAX_HEAD_SIZE = 128


def _forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    out, lse_BHS1, *_ = aten._scaled_dot_product_cudnn_attention(
        *map(unit_stride, (q, k, v)), None, True, 0.0, rule.offset is not None, False, scale=rule.scale
    )
    return out, lse_BHS1[..., 0]


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule) -> Gradients:
    # Without dropout the random state is never read.
    no_state = torch.empty((), dtype=torch.int64, device=q.device)
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        *map(unit_stride, (dout, q, k, v, out)), lse[..., None].contiguous(), no_state, no_state, None, None, None,
        q.shape[2], k.shape[2], 0.0, rule.offset is not None, scale=rule.scale,
    )  # fmt: skip
    return Gradients(*gradients)


def _refuses(need: Need) -> str | None:
    rule = need.rule
    if (reason := refuses_on_gpu(need, different_values=True)) is not None:
        return reason
    if need.q.shape[2] < 2 or need.keys < 2:
        return "it supports no single query row and no single key"
    if not torch.backends.cudnn.is_available():
        return "this build of torch has no cuDNN"
    if max(need.q.shape[3], need.value_head_size) > _MAX_HEAD_SIZE:
        return f"it supports head sizes up to {_MAX_HEAD_SIZE}"
    if rule.cu_seqlens is not None or rule.window is not None:
        return "this adapter supports neither packing nor windows"
    if rule.offset is not None and (rule.offset != 0 or need.q.shape[2] != need.keys):
        return "its causal rule is aligned to the first key, so it needs as many queries as keys"
    return None


CUDNN = Kernel("cuDNN", _forward, _backward, _refuses, max_rows=None)
