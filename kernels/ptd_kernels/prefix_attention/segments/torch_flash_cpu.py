"""torch's flash attention for CPU. README.md lists its measured properties. Legend of shapes: problem.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.problem import stood_in_for
from ptd_kernels.prefix_attention.segments.kernel import HALF, Gradients, Kernel, Need, Rule, unit_stride, visible_keys

attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Its inner matrix products are up to twice as slow when the number of keys is not a multiple of the vector length.
VECTOR = 16
_FEW_ROWS = 32


def _keys(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor, bool, Tensor | None]:
    """Return keys, values, is_causal and float bias for this kernel, whose causal mask starts at the top left."""
    rows, keys = q.shape[2], k.shape[2]
    extra = -keys % VECTOR if rows >= _FEW_ROWS else 0
    if extra:
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, extra)) for x in (k, v))
    free = rule.mask is None and rule.bias is None
    if free and rule.offset == 0 and rule.window is None and (rows <= keys or not extra):
        return k, v, True, None
    work = torch.promote_types(q.dtype, torch.float32)
    visible = visible_keys(rows, keys, rule, q.device)
    if rule.mask is None and visible is None and not extra:
        return k, v, False, None if rule.bias is None else rule.bias.to(work)
    given = [x.shape for x in (visible, rule.mask, rule.bias) if x is not None]
    shape = torch.broadcast_shapes((1, 1, 1, keys), *given)
    bias = torch.full((*shape[:3], keys + extra), -torch.inf, dtype=work, device=q.device)
    inside = bias[..., :keys].copy_(torch.zeros((), device=q.device) if rule.bias is None else rule.bias)
    for shown in (visible, rule.mask):
        if shown is not None:
            inside.masked_fill_(~shown, -torch.inf)
    return k, v, False, bias


def _forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    k, v, causal, bias = _keys(q, k, v, rule)
    out, lse = attend(unit_stride(q), unit_stride(k), unit_stride(v), 0.0, causal, attn_mask=bias, scale=rule.scale)
    if bias is not None and not (rule.mask is None and rule.bias is None):
        # For a row whose keys are all hidden, the kernel reports lse 0, which the merge would read as a sum of one.
        lse = lse.masked_fill(bias.amax(dim=-1) == -torch.inf, -torch.inf)
    return out, lse


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule) -> Gradients:
    keys = k.shape[2]
    if q.dtype in HALF:
        # In half precision, this kernel rounds dk and dv after every block of queries and is three times slower.
        dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
    k, v, causal, bias = _keys(q, k, v, rule)
    dout, q, k, v, out = map(unit_stride, (dout, q, k, v, out))
    dq, dk, dv = attend_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=rule.scale)
    return Gradients(dq, dk[:, :, :keys], dv[:, :, :keys])


def _refuses(need: Need) -> str | None:
    if need.q.device.type != "cpu" or stood_in_for() is not None:
        return f"it needs tensors on the CPU, but they are on {need.q.device}"
    if need.rule.softcap is not None:
        return "it supports no softcap"
    if need.q.shape[3] != need.value_head_size:
        return "it needs the same head size for keys and values"
    return None


TORCH_FLASH_CPU = Kernel(
    "torch flash (CPU)",
    _forward,
    _backward,
    _refuses,
    # A bound that needs a bias gets it in slices of rows, so that its memory stays linear in the number of keys.
    max_rows=lambda device, heads, keys, bounded: 256 if bounded else 1 << 62,
)
