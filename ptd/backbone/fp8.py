"""Frozen linear layers in 8-bit floating point, forward and backward (experimental).

Weights are rounded once, with one scale per output channel, from its largest magnitude. Their other factor is rounded
in every product, with one scale per token (Micikevicius et al. 2022, "FP8 formats for deep learning"). A frozen weight
has no gradient, so a layer consists of two products, ``y = x Wᵀ`` and ``dx = dy W``. In the second product the weight's
scales run along the summed dimension, where no kernel accepts scales, so ``dy`` is multiplied by them before it is
rounded. Both products therefore read the same copy of the weight, with one byte per number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ptd.types import UserError

E4M3 = torch.float8_e4m3fn
GRADIENT = E4M3
"""Dtype of ``dy``: each row's own scale provides the range, and E5M2 was no closer to bfloat16 (benchmarks/fp8.py)."""
MULTIPLE = 16
"""The GPU's matrix products require both sides of a weight to be multiples of this number."""
CAPABILITY = (8, 9)
"""Lowest compute capability of an NVIDIA GPU that multiplies in fp8: Ada has 8.9, Hopper 9.0."""
_SMALLEST = 1e-30
_WORKS = (torch.float32, torch.bfloat16, torch.float16)


def check_device(device: torch.device) -> None:
    """Raise `UserError` for a GPU that does not multiply in fp8."""
    if device.type != "cuda":
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability < CAPABILITY:
        raise UserError(
            f"backbone.quantization: fp8 needs an NVIDIA GPU of compute capability {'.'.join(map(str, CAPABILITY))} or "
            f"higher (Ada, Hopper), but this GPU is {name}; use int8 or nf4"
        )


def quantise(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Replace the model's linear layers by `Fp8Linear`, one weight at a time, on ``device``.

    The output layer, weights tied to the embeddings, modules that transformers keeps in float32, experts that are not
    linear layers, and layers whose sides are not multiples of 16 stay in the model's dtype. Raises `UserError` if no
    layer is replaced.
    """
    kept = HfQuantizer.get_modules_to_not_convert(model, None, getattr(model, "_keep_in_fp32_modules", None))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and should_convert_module(name, kept):
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
            if not any(side % MULTIPLE for side in weight.shape):
                model.set_submodule(name, Fp8Linear(weight.detach().to(device), module.bias))
    if not any(isinstance(module, Fp8Linear) for module in model.modules()):
        raise UserError(
            f"backbone.quantization: {type(model).__name__} has no linear layer whose sides are multiples of "
            f"{MULTIPLE}, which fp8 requires; set quantization: none"
        )
    return model


class Fp8Linear(nn.Linear):
    """A frozen linear layer with ``weight`` ``[out, in]`` in E4M3, to be multiplied by ``scale`` ``[out]`` (fp32)."""

    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        rounded, scale = to_fp8(weight)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(weight.device), requires_grad=False)
        self.register_buffer("scale", scale.flatten())

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[…, in]`` to ``[…, out]`` in the dtype of ``x``; products are rounded to bfloat16, as on a GPU."""
        assert x.dtype in _WORKS, x.dtype  # some models cast x to the dtype of a weight
        output: Tensor = _Product.apply(x, self.weight, self.scale)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={E4M3}"


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


# Registered as operators, so that torch.compile and the trace of ``ptd plan`` see a product on every device.
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
