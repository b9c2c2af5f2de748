"""torch's memory-efficient attention for NVIDIA GPUs, as two kernels: with native packing, or with a dense bias.

For what flash attention does not support: fp32, other head sizes for the values, older GPUs, masks and biases. Never
run yet; what the kernels do is known from their source (README.md). Legend of shapes: problem.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.problem import nvidia_capability
from ptd_kernels.prefix_attention.segments.dense_rule import dense_bias, rows_of_one_call, without_hidden_rows
from ptd_kernels.prefix_attention.segments.efficient_operator import (
    CAUSAL,
    CAUSAL_AT_THE_END,
    EVERYTHING,
    alignment,
    efficient_backward,
    efficient_forward,
    padded_rows,
    unusable,
)
from ptd_kernels.prefix_attention.segments.kernel import Gradients, Kernel, Need, Rule, from_flash_layout

_MOST_BLOCKS = 65535
"""CUDA's limit on the second and third axis of a grid: heads and sequences."""


def _layout(x_BHSX: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
    """Return ``[B, S, heads, X]``: the kernel needs as many key as query heads, so a group's keys are repeated."""
    x_BSHX = x_BHSX.to(dtype).transpose(1, 2)
    group = heads // x_BSHX.shape[2]
    return x_BSHX if group == 1 else x_BSHX.unsqueeze(3).expand(-1, -1, -1, group, -1).flatten(2, 3)


def _summed(gradient_BSHX: Tensor, heads: int) -> Tensor:
    """Undo `_layout` for a gradient: sum over the query heads of a group, in at least fp32."""
    if gradient_BSHX.shape[2] != heads:
        work = torch.promote_types(gradient_BSHX.dtype, torch.float32)
        gradient_BSHX = gradient_BSHX.unflatten(2, (heads, -1)).sum(3, dtype=work)
    return from_flash_layout(gradient_BSHX, packed=False)


# ---- without a bias


def _kind(q: Tensor, k: Tensor, rule: Rule) -> int:
    if rule.offset is None:
        return EVERYTHING
    return CAUSAL if q.shape[2] == k.shape[2] else CAUSAL_AT_THE_END


def _longest(q: Tensor, rule: Rule) -> int:
    rows = q.shape[2]
    return rows if rule.cu_seqlens is None or rule.max_seqlen is None else min(rule.max_seqlen, rows)


def _places(cu_seqlens: Tensor, rows: int, longest: int) -> Tensor:
    """Return for each row of the pack its place in a log-sum-exp that is padded sequence by sequence."""
    row = torch.arange(rows, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, row, right=True) - 1
    return row - cu_seqlens[sequence] + sequence * padded_rows(longest)


def _forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    rows, longest = q.shape[2], _longest(q, rule)
    x = [_layout(x, q.dtype, q.shape[1]) for x in (q, k, v)]
    out, lse = efficient_forward(*x, None, rule.cu_seqlens, longest, _kind(q, k, rule), rule.scale)
    if rule.cu_seqlens is not None:
        lse_HN = lse.transpose(0, 1).flatten(1)
        lse = lse_HN.index_select(1, _places(rule.cu_seqlens, rows, longest))[None]
    return from_flash_layout(out, packed=False), lse[..., :rows]


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule) -> Gradients:
    rows, longest = q.shape[2], _longest(q, rule)
    dout_, q_, k_, v_, out_ = (_layout(x, q.dtype, q.shape[1]) for x in (dout, q, k, v, out))
    if rule.cu_seqlens is None:
        sums = torch.nn.functional.pad(lse, (0, padded_rows(rows) - rows), value=torch.inf)
    else:
        sequences = rule.cu_seqlens.numel() - 1
        sums_HN = lse.new_full((lse.shape[1], sequences * padded_rows(longest)), torch.inf)
        sums_HN.index_copy_(1, _places(rule.cu_seqlens, rows, longest), lse[0])
        sums = sums_HN.unflatten(1, (sequences, -1)).transpose(0, 1)
    dq, dk, dv = efficient_backward(
        dout_, q_, k_, v_, None, out_, sums, rule.cu_seqlens, longest, _kind(q, k, rule), rule.scale
    )
    return Gradients(from_flash_layout(dq, packed=False), _summed(dk, k.shape[1]), _summed(dv, k.shape[1]))


def _refuses(need: Need) -> str | None:
    rule = need.rule
    if (reason := _refuses_any(need, need.q.dtype)) is not None:
        return reason
    if rule.mask is not None or rule.bias is not None:
        return "it takes a mask or a bias only as a dense bias"
    if rule.window is not None:
        return "its window is tested by nobody in torch"
    if rule.sequences is not None:
        return "it separates packed sequences by their offsets"
    if rule.offset is not None and not rule.offset == need.keys - need.q.shape[2] >= 0:
        return "with a causal rule it needs the last query at the last key, and no more queries than keys"
    if rule.cu_seqlens is not None and rule.cu_seqlens.numel() - 1 > _MOST_BLOCKS:
        return f"it supports at most {_MOST_BLOCKS} sequences"
    return None


# ---- with a dense bias


def _dtype(q: Tensor, bias: Tensor | None) -> torch.dtype:
    """Return the dtype to compute in: the kernel adds a bias of the queries' dtype, so a more exact bias decides."""
    return q.dtype if bias is None else torch.promote_types(q.dtype, bias.dtype)


def _biased_forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    rows, dtype = q.shape[2], _dtype(q, rule.bias)
    bias, hidden = dense_bias(rows, k.shape[2], rule, dtype, q.device)
    x = [_layout(x, dtype, q.shape[1]) for x in (q, k, v)]
    out, lse = efficient_forward(*x, bias, None, rows, EVERYTHING, rule.scale)
    return without_hidden_rows(from_flash_layout(out, packed=False), lse[..., :rows], hidden)


def _biased_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule) -> Gradients:
    rows, dtype = q.shape[2], _dtype(q, rule.bias)
    bias, _ = dense_bias(rows, k.shape[2], rule, dtype, q.device)
    dout_, q_, k_, v_, out_ = (_layout(x, dtype, q.shape[1]) for x in (dout, q, k, v, out))
    sums = torch.nn.functional.pad(lse, (0, padded_rows(rows) - rows), value=torch.inf)
    dq, dk, dv = efficient_backward(dout_, q_, k_, v_, bias, out_, sums, None, rows, EVERYTHING, rule.scale)
    return Gradients(from_flash_layout(dq, packed=False), _summed(dk, k.shape[1]), _summed(dv, k.shape[1]))


def _biased_refuses(need: Need) -> str | None:
    if need.rule.cu_seqlens is not None:
        return "it supports no packing: a bias over the whole pack would be computed"
    return _refuses_any(need, _dtype(need.q, need.rule.bias))


# ---- both


def _refuses_any(need: Need, dtype: torch.dtype) -> str | None:
    q, numbers = need.q, alignment(dtype)
    B, H, _, D = q.shape
    capability = nvidia_capability(q.device)
    if capability is None:
        return f"it needs an NVIDIA GPU, but the tensors are on {q.device}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in fp32, fp16 and bf16, not in {dtype}"
    if capability < ((8, 0) if dtype == torch.bfloat16 else (7, 0)):
        return "it needs compute capability 7.0 or higher, for bf16 8.0"
    if need.rule.softcap is not None:
        return "it supports no softcap"
    if D % numbers or need.value_head_size % numbers:
        return f"in {dtype}, it needs head sizes that are multiples of {numbers}"
    if need.exact_keys:
        return "a prefix has too few keys for it: each block of 64 keys is one block of threads"
    if max(B, H) > _MOST_BLOCKS:
        return f"it supports at most {_MOST_BLOCKS} sequences and heads"
    if need.keys * H * max(D, need.value_head_size) >= 2**31:
        return "it computes the offset of a key in 32 bits"
    return unusable()


TORCH_EFFICIENT = Kernel("torch memory-efficient", _forward, _backward, _refuses, max_rows=None)
TORCH_EFFICIENT_BIASED = Kernel(
    "torch memory-efficient, dense bias",
    _biased_forward,
    _biased_backward,
    _biased_refuses,
    max_rows=rows_of_one_call,
)
