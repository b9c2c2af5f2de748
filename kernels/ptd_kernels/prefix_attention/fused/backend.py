"""The backends `triton` (fused kernels: one forward, four backward) and `decode` (the forward kernel of few queries).

``backend="auto"`` chooses `decode` on NVIDIA GPUs for generated tokens: no library kernel attends to a prefix and a
masked cache without copies of the cache. It never chooses `triton`. Neither has been timed on a GPU yet. The first call
imports Triton. Legend of shapes: problem.py.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.fused.availability import INTERPRETED, refuses_unasked, triton_refuses
from ptd_kernels.prefix_attention.fused.tile_table import decodes
from ptd_kernels.prefix_attention.problem import Backend, Problem, register_backend


def triton_attention(problem: Problem) -> Tensor:
    """Solve `problem` with the fused kernels."""
    if refuses_decoding(problem) is None:
        return decode_attention(problem)
    from ptd_kernels.prefix_attention.fused.operator import prefix_attention_forward

    p = problem
    out: Tensor
    out, _ = prefix_attention_forward(
        p.q_BHSD, p.k_BHTD, p.v_BHTE, p.prefix_k_HPD, p.prefix_v_HPE, p.bias, p.cu_seqlens, *_on_device(p),
        p.scale, p.causal, p.window, p.softcap,
    )  # fmt: skip
    return out


def decode_attention(problem: Problem) -> Tensor:
    """Solve `problem`, which has few queries and needs no gradient, with the kernel for decoding."""
    from ptd_kernels.prefix_attention.fused.decode_operator import prefix_attention_decode

    p = problem
    bias = p.mask if p.bias is None else p.bias
    if p.mask is not None and p.bias is not None:
        bias = p.bias.masked_fill(~p.mask, -torch.inf)
    out: Tensor = prefix_attention_decode(
        p.q_BHSD, p.k_BHTD, p.v_BHTE, p.prefix_k_HPD, p.prefix_v_HPE, bias, *_on_device(p),
        p.scale, p.causal, p.window, p.softcap,
    )  # fmt: skip
    return out


def _on_device(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Return `prefix_index` and `prefix_bounds` as int32 tensors on the kernels' device."""
    index, bounds = problem.prefix_index, problem.prefix_bounds
    if index is None or bounds is None:
        return None, None
    device = problem.q_BHSD.device
    if len({b - a for a, b in pairwise(bounds)}) == 1:
        # With equal lengths, the device computes the bounds, and nothing is copied to it.
        starts = torch.arange(len(bounds), dtype=torch.int32, device=device) * bounds[1]
    else:
        starts = torch.tensor(bounds, dtype=torch.int32, device=device)
    return index.to(device, torch.int32, non_blocking=True), starts


def refuses(problem: Problem) -> str | None:
    """Return why `triton_attention` cannot solve `problem`, or None."""
    if problem.mask is not None and refuses_decoding(problem) is not None:
        return "the Triton kernel supports no mask; pack the sequences (cu_seqlens)"
    return _refuses_dtype(problem) or triton_refuses(problem.q_BHSD.device)


def refuses_decoding(problem: Problem) -> str | None:
    """Return why a call is none for the decode kernel, on any device, or None."""
    q, k = problem.q_BHSD, problem.k_BHTD
    if problem.cu_seqlens is not None:
        return "the decode kernel supports no packed sequences"
    if not decodes(q.shape[2], q.shape[1] // k.shape[1], q.dtype != torch.float32):
        return f"the decode kernel takes few query rows, not {q.shape[2]} of {q.shape[1]} heads"
    tensors = q, k, problem.v_BHTE, problem.prefix_k_HPD, problem.prefix_v_HPE
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return "the decode kernel computes no gradients"
    return None


def _refuses_decode(problem: Problem) -> str | None:
    """Return why the decode kernel cannot solve `problem` on its GPU, or None; `auto` may choose it unasked."""
    return refuses_unasked(problem.q_BHSD) or _refuses_dtype(problem) or refuses_decoding(problem)


def _refuses_dtype(problem: Problem) -> str | None:
    if problem.q_BHSD.dtype == torch.float64:
        return "the Triton kernel computes in fp32, fp16 or bf16, not in fp64"
    return None


def _explain(problem: Problem) -> str:
    return f"one fused kernel over prefix and own tokens, {_how()}"


def _explain_decode(problem: Problem) -> str:
    return f"one kernel over prefix and own tokens, with the keys split over the whole GPU, {_how()}"


def _how() -> str:
    return "in Triton's interpreter: slow, for tests" if INTERPRETED else "compiled; not yet measured on a GPU"


# Below merge: "auto" may choose it only once a GPU has timed it against merge.
register_backend(Backend("triton", triton_attention, refuses=refuses, explains=_explain, priority=-1))
register_backend(Backend("decode", decode_attention, refuses=_refuses_decode, explains=_explain_decode, priority=30))
