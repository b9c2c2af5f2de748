"""The backend `triton`: one fused kernel forward, four backward. The first call imports Triton.

``backend="auto"`` never chooses it, because it has not been timed on a GPU yet. Legend of shapes: problem.py.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.fused.availability import INTERPRETED, triton_refuses
from ptd_kernels.prefix_attention.problem import Backend, Problem, register_backend


def triton_attention(problem: Problem) -> Tensor:
    """Solve `problem` with the fused kernels."""
    from ptd_kernels.prefix_attention.fused.operator import prefix_attention_forward

    p = problem
    out: Tensor
    out, _ = prefix_attention_forward(
        p.q_BHSD, p.k_BHTD, p.v_BHTE, p.prefix_k_HPD, p.prefix_v_HPE, p.bias, p.cu_seqlens, *_on_device(p),
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
    if problem.mask is not None:
        return "the Triton kernel supports no mask; pack the sequences (cu_seqlens)"
    if problem.q_BHSD.dtype == torch.float64:
        return "the Triton kernel computes in fp32, fp16 or bf16, not in fp64"
    return triton_refuses(problem.q_BHSD.device)


def _explain(problem: Problem) -> str:
    how = "in Triton's interpreter: slow, for tests" if INTERPRETED else "compiled; not yet measured on a GPU"
    return f"one fused kernel over prefix and own tokens, {how}"


# Below merge: "auto" may choose it only once a GPU has timed it against merge.
register_backend(Backend("triton", triton_attention, refuses=refuses, explains=_explain, priority=-1))
