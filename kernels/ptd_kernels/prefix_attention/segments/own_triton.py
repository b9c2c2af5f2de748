"""The fused Triton kernels of this package (fused/) as kernels for one segment: for a softcap, on every recent GPU.

They support every rule but a mask, which becomes a dense bias. Never run on a GPU yet. Legend of shapes: problem.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.fused.availability import refuses_unasked
from ptd_kernels.prefix_attention.segments.dense_rule import dense_bias, rows_of_one_call, without_hidden_rows
from ptd_kernels.prefix_attention.segments.kernel import Gradients, Kernel, Need, Rule


def _options(rule: Rule, bias: Tensor | None) -> tuple[Any, ...]:
    """Return the operators' arguments after the values: no prefix, and the rule or, with a bias, only the bias."""
    causal = bias is None and rule.offset is not None
    window, cu_seqlens = (rule.window, rule.cu_seqlens) if bias is None else (None, None)
    return None, None, bias, cu_seqlens, None, None, rule.scale, causal, window, rule.softcap


def _forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from ptd_kernels.prefix_attention.fused.operator import prefix_attention_forward

    out, lse = prefix_attention_forward(q, k, v, *_options(rule, bias))
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule, bias: Tensor | None = None
) -> Gradients:
    from ptd_kernels.prefix_attention.fused.operator import prefix_attention_backward

    gradients = prefix_attention_backward(
        dout, out.to(q.dtype), lse.contiguous(), q, k, v, *_options(rule, bias), True, True, False
    )
    return Gradients(*gradients[:3])


def _biased_forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    bias, hidden = _bias(q, k, rule)
    return without_hidden_rows(*_forward(q, k, v, rule, bias), hidden)


def _biased_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule) -> Gradients:
    return _backward(dout, q, k, v, out, lse, rule, _bias(q, k, rule)[0])


def _bias(q: Tensor, k: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    dtype = q.dtype if rule.bias is None else rule.bias.dtype
    return dense_bias(q.shape[2], k.shape[2], rule, dtype, q.device)


def _refuses(need: Need) -> str | None:
    rule = need.rule
    if rule.mask is not None or rule.bias is not None:
        return "it takes a mask or a bias only as a dense bias"
    if rule.sequences is not None:
        return "it separates packed sequences by their offsets"
    if rule.offset is not None and not rule.offset == need.keys - need.q.shape[2] >= 0:
        return "with a causal rule it needs the last query at the last key, and no more queries than keys"
    return _refuses_any(need)


def _biased_refuses(need: Need) -> str | None:
    if need.rule.cu_seqlens is not None:
        return "it supports no packing: a bias over the whole pack would be computed"
    return _refuses_any(need)


def _refuses_any(need: Need) -> str | None:
    if need.exact_keys:
        return "it rounds the gradient of a key to q's dtype"
    if torch.float64 in (need.q.dtype, None if need.rule.bias is None else need.rule.bias.dtype):
        return "it computes in fp32, fp16 or bf16, not in fp64"
    return refuses_unasked(need.q)


OWN_TRITON = Kernel("own Triton kernels", _forward, _backward, _refuses, max_rows=None)
OWN_TRITON_BIASED = Kernel(
    "own Triton kernels, dense bias",
    _biased_forward,
    _biased_backward,
    _biased_refuses,
    max_rows=rows_of_one_call,
)
