"""The backend `triton`: one fused kernel forward, four backward. The first call imports Triton.

``backend="auto"`` never chooses it, because it has not been timed on a GPU yet. Legend of shapes: problem.py.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.fused.availability import INSTALLED, INTERPRETED
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
    q = problem.q_BHSD
    if not INSTALLED:
        return "Triton is not installed (pip install triton; Linux only)"
    if problem.mask is not None:
        return "the Triton kernel supports no mask; pack the sequences (cu_seqlens)"
    if q.dtype == torch.float64:
        return "the Triton kernel computes in fp32, fp16 or bf16, not in fp64"
    if INTERPRETED and q.dtype == torch.bfloat16:
        return "Triton's interpreter (TRITON_INTERPRET=1) supports no bf16"
    if INTERPRETED:
        return None
    if q.device.type != "cuda":
        return f"Triton needs a GPU, but the tensors are on {q.device}; TRITON_INTERPRET=1 runs it slowly without one"
    if torch.version.cuda is None or torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the Triton kernel needs an NVIDIA GPU of the Ampere generation (sm_80) or newer"
    return None


def _explain(problem: Problem) -> str:
    how = "in Triton's interpreter: slow, for tests" if INTERPRETED else "compiled; not yet measured on a GPU"
    return f"one fused kernel over prefix and own tokens, {how}"


register_backend(Backend("triton", triton_attention, refuses=refuses, explains=_explain, priority=-1))
