"""torch's memory-efficient attention for CUDA as two operators of our own: what it requires, stated and arranged.

These are xFormers' CUTLASS kernels (after Rabe & Staats 2021, arXiv:2112.05682), which torch contains; xFormers itself
calls them there. torch's function for tensors without data fails in the backward operator, so both are wrapped.
Layout ``[B, S, H, X]``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

aten = torch.ops.aten
EVERYTHING, CAUSAL, CAUSAL_AT_THE_END = 0, 1, 2
"""Kinds of rules: all keys; keys up to the row's number; the same, but the last row sees the last key."""
LSE_ALIGNED = 32
"""The log-sum-exp is padded to a multiple of this many rows."""
_SIGNATURES = (
    "aten::_efficient_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, float dropout_p, int custom_mask_type, "
    "bool compute_log_sumexp=False, *, float? scale=None) -> (Tensor output, Tensor logsumexp, Tensor philox_seed, "
    "Tensor philox_offset, SymInt max_seqlen_batch_q, SymInt max_seqlen_batch_k)",
    "aten::_efficient_attention_backward(Tensor grad_out_, Tensor query, Tensor key, Tensor value, Tensor? bias, "
    "Tensor out, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "Tensor logsumexp, float dropout_p, Tensor philox_seed, Tensor philox_offset, int custom_mask_type, "
    "bool bias_requires_grad, *, float? scale=None) -> (Tensor, Tensor, Tensor, Tensor)",
)


@functools.cache
def unusable() -> str | None:
    """Return why this version of torch cannot be used, or None: its operators must have the signatures known here."""
    for signature in _SIGNATURES:
        expected = torch._C.parse_schema(signature)
        name = expected.name.removeprefix("aten::")
        if not hasattr(aten, name):
            return f"torch {torch.__version__} has no {expected.name}"
        if not getattr(aten, name).default._schema.is_backward_compatible_with(expected):
            return f"{expected.name} of torch {torch.__version__} has other arguments than this adapter passes"
    return None


def alignment(dtype: torch.dtype) -> int:
    """Return of how many numbers head sizes and strides must be multiples: those of one access of 16 bytes."""
    return 16 // dtype.itemsize


def padded_rows(rows: int) -> int:
    """Return the number of rows in the log-sum-exp of this many rows."""
    return -(-rows // LSE_ALIGNED) * LSE_ALIGNED


def _aligned(x_BSHX: Tensor) -> Tensor:
    """Return `x` at an address and with strides that the kernel accepts; a copy if it needs one."""
    numbers = alignment(x_BSHX.dtype)
    places = (x_BSHX.storage_offset(), *x_BSHX.stride()[:3])
    # The forward kernel computes the offset of a key in 32 bits, unchecked.
    far = x_BSHX.shape[1] * x_BSHX.stride(1) >= 2**31
    if x_BSHX.stride(3) == 1 and not far and not any(place % numbers for place in places):
        return x_BSHX
    return x_BSHX.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("ptd_kernels::efficient_attention", mutates_args=())
def efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int, kind: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return output ``[B, S, H, E]`` and log-sum-exp ``[B, H, padded_rows(S)]``; packed (B = 1):
    ``[sequences, H, padded_rows(max_seqlen)]``, with arbitrary numbers beyond a sequence's rows.

    k and v have as many heads as q. `bias` ``[B or 1, H or 1, S, T]`` has q's dtype and rows that begin at multiples of
    16 bytes; it excludes packing. Rows that see no key must not occur, except by `bias`; their results are undefined.
    """
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[2], -1, -1)
    longest = None if cu_seqlens is None else max_seqlen
    out, lse, *_ = aten._efficient_attention_forward(
        *map(_aligned, (q, k, v)), bias, cu_seqlens, cu_seqlens, longest, longest, 0.0, kind, True, scale=scale
    )
    return out, lse


@efficient_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int, kind: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, S, H, _ = q.shape
    sequences, rows = (B, S) if cu_seqlens is None else (cu_seqlens.numel() - 1, max_seqlen)
    return q.new_empty(B, S, H, v.shape[3]), q.new_empty(sequences, H, padded_rows(rows), dtype=torch.float32)


@torch.library.custom_op("ptd_kernels::efficient_attention_backward", mutates_args=())
def efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, max_seqlen: int, kind: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v.

    out and lse, in the layout of `efficient_forward`, may come from a softmax over more keys: the kernel computes only
    ``exp(s - lse)`` and ``rowsum(dout * out)`` from them. Rows of lse that belong to no query must be inf.
    """
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[2], -1, -1)
    rows, keys = (q.shape[1], k.shape[1]) if cu_seqlens is None else (max_seqlen, max_seqlen)
    # Without dropout the random state is never read.
    no_state = torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = aten._efficient_attention_backward(
        dout.contiguous(), *map(_aligned, (q, k, v)), bias, out.contiguous(), cu_seqlens, cu_seqlens, rows, keys,
        lse.contiguous(), 0.0, no_state, no_state, kind, False, scale=scale,
    )  # fmt: skip
    return dq, dk, dv


@efficient_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, max_seqlen: int, kind: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv
