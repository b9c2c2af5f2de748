"""cuDNN's attention, through torch's operators. Never run so far. Legend of shapes: problem.py."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.segments.kernel import Gradients, Kernel, Need, Rule, refuses_on_gpu, unit_stride

aten = torch.ops.aten
_MAX_HEAD_SIZE = 128


@functools.cache
def _sums_have_an_axis_more() -> bool:
    """Return whether this torch gives the log-sum-exp a last axis of size one; tensors without data tell."""
    q = torch.empty(1, 1, 2, 8, dtype=torch.float16, device="meta")
    return int(aten._scaled_dot_product_cudnn_attention(q, q, q, None, True)[1].dim()) == 4


def _forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        *map(unit_stride, (q, k, v)), None, True, 0.0, rule.offset is not None, False, scale=rule.scale
    )
    return out, lse.view(q.shape[:3])


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule) -> Gradients:
    # Without dropout the random state is never read.
    no_state = torch.empty((), dtype=torch.int64, device=q.device)
    sums = (lse[..., None] if _sums_have_an_axis_more() else lse).contiguous()
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        *map(unit_stride, (dout, q, k, v, out)), sums, no_state, no_state, None, None, None,
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
    if os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "0") != "0":
        return "with TORCH_CUDNN_SDPA_AVOID_RECOMPILE it expects the log-sum-exp in another memory layout"
    if max(need.q.shape[3], need.value_head_size) > _MAX_HEAD_SIZE:
        return f"it supports head sizes up to {_MAX_HEAD_SIZE}"
    if rule.cu_seqlens is not None or rule.window is not None:
        return "this adapter supports neither packing nor windows"
    if rule.offset is not None and (rule.offset != 0 or need.q.shape[2] != need.keys):
        return "its causal rule is aligned to the first key, so it needs as many queries as keys"
    return None


CUDNN = Kernel("cuDNN", _forward, _backward, _refuses, max_rows=None)
