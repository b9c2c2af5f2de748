"""``y = x Wᵀ`` and ``dx = dy W`` in fp8: rounding by rows, and the autograd formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptd_kernels.fp8_linear import operators  # noqa: F401  (registers them)

E4M3 = torch.float8_e4m3fn
GRADIENT = E4M3
"""Dtype of ``dy``: each row's own scale provides the range, and E5M2 was no closer to bfloat16 (benchmarks/fp8.py)."""
MULTIPLE = 16
"""The GPU's matrix products require both sides of a weight to be multiples of this number."""
_SMALLEST = 1e-30


def to_fp8(x: Tensor, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """Return the rows ``[N, K]`` divided by their scales, in fp8 and contiguous, and the scales ``[N, 1]`` (fp32)."""
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True, dtype=torch.float32)
    scale = (largest / torch.finfo(dtype).max).clamp_min(_SMALLEST)
    return (x / scale).to(dtype).contiguous(), scale


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        rows, row_scale = to_fp8(x.reshape(-1, x.shape[-1]))
        output: Tensor = torch.ops.ptd.fp8_linear(rows, row_scale, weight, scale)
        return output.view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        rows, row_scale = to_fp8(gradient.reshape(-1, gradient.shape[-1]) * scale, GRADIENT)
        output: Tensor = torch.ops.ptd.fp8_linear_input(rows, row_scale, weight)
        return output.view(*gradient.shape[:-1], -1).to(gradient.dtype), None, None


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Map ``x`` ``[…, in]`` to ``[…, out]`` in its dtype, by an fp8 ``weight`` ``[out, in]`` with ``scale`` ``[out]``.

    The products are rounded to bfloat16. ``weight`` and ``scale`` get no gradient.
    """
    output: Tensor = _Product.apply(x, weight, scale)
    return output
