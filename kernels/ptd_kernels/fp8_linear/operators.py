"""The two products as `torch.library` operators, so that torch.compile and ``ptd plan`` see them on every device."""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define("ptd::fp8_linear", "(Tensor rows, Tensor row_scale, Tensor weight, Tensor scale) -> Tensor")
torch.library.define("ptd::fp8_linear_input", "(Tensor rows, Tensor row_scale, Tensor weight) -> Tensor")


@torch.library.impl("ptd::fp8_linear", "cuda")
def _linear_cuda(rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply rows ``[N, in]`` by the weight ``[out, in]``: bf16 ``[N, out]``. The epilogue applies both scales."""
    return torch._scaled_mm(rows, weight.t(), scale_a=row_scale, scale_b=scale[None], out_dtype=torch.bfloat16)


@torch.library.impl("ptd::fp8_linear_input", "cuda")
def _linear_input_cuda(rows: Tensor, row_scale: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows ``[N, out]`` by the weight ``[out, in]``: bf16 ``[N, in]``.

    Hopper multiplies fp8 only if the summed dimension is contiguous in both factors, so every call transposes the
    weight, at two bytes of memory traffic per number. Storing both layouts would need a second byte per number, as much
    as bf16.
    """
    turned = weight.t().contiguous()
    ones = row_scale.new_ones(1, weight.shape[1])
    return torch._scaled_mm(rows, turned.t(), scale_a=row_scale, scale_b=ones, out_dtype=torch.bfloat16)


# On a CPU without fp8 instructions, torch's own fp8 product is about a thousand times slower than its fp32 product. The
# fp32 product multiplies the same fp8 numbers exactly and sums them as on a GPU, except for the order.
@torch.library.impl("ptd::fp8_linear", "cpu")
def _linear_cpu(rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return (rows.float() @ weight.float().t()).mul_(row_scale).mul_(scale).bfloat16()


@torch.library.impl("ptd::fp8_linear_input", "cpu")
def _linear_input_cpu(rows: Tensor, row_scale: Tensor, weight: Tensor) -> Tensor:
    return (rows.float() @ weight.float()).mul_(row_scale).bfloat16()


def _linear_fake(rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0], dtype=torch.bfloat16)


def _linear_input_fake(rows: Tensor, row_scale: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1], dtype=torch.bfloat16)


torch.library.register_fake("ptd::fp8_linear", _linear_fake)
torch.library.register_fake("ptd::fp8_linear_input", _linear_input_fake)
