"""Frozen linear layers in 8-bit floating point, forward and backward: an experiment.

Weights are rounded once, each output channel over its largest magnitude; what is multiplied with them is rounded each
time, token by token (Micikevicius et al. 2022, "FP8 formats for deep learning"). A frozen weight has no gradient, so a
layer is two products, ``y = x Wᵀ`` and ``dx = dy W``. In the second the weight's scales lie along the sum, where no
kernel takes them: they go into ``dy`` before it is rounded, so that both products read one copy of one byte a weight.
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
"""Of ``dy``: the row's own scale gives the range, and E5M2 came no closer to bfloat16 (benchmarks/fp8.py)."""
MULTIPLE = 16
"""What both sides of a weight have to be multiples of for the GPU's products."""
CAPABILITY = (8, 9)
"""The first NVIDIA GPUs that multiply in fp8: Ada (8.9), Hopper (9.0)."""
_SMALLEST = 1e-30
_WORKS = (torch.float32, torch.bfloat16, torch.float16)


def check_device(device: torch.device) -> None:
    """Raises `UserError` for a GPU that does not multiply in fp8."""
    if device.type != "cuda":
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability < CAPABILITY:
        raise UserError(
            f"backbone.quantization: fp8 needs an NVIDIA GPU of compute capability {'.'.join(map(str, CAPABILITY))} or "
            f"later (Ada, Hopper), and {name} is none; use int8 or nf4"
        )


def quantise(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Put `Fp8Linear` in the place of the model's linear layers, weight by weight on ``device``.

    The output layer, what is tied to the embeddings, what transformers keeps in float32, experts that are no linear
    layers, and layers whose sides are no multiples of 16 stay in the model's dtype. Raises `UserError` if that is all.
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
            f"{MULTIPLE}, as fp8 needs them; set quantization: none"
        )
    return model


class Fp8Linear(nn.Linear):
    """A frozen layer whose ``weight`` ``[out, in]`` is E4M3, to be multiplied with ``scale`` ``[out]`` (fp32)."""

    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        rounded, scale = to_fp8(weight)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(weight.device), requires_grad=False)
        self.register_buffer("scale", scale.flatten())

    def forward(self, x: Tensor) -> Tensor:
        """``[…, in]`` -> ``[…, out]`` in the dtype of ``x``; products are rounded to bfloat16, as the GPU's are."""
        assert x.dtype in _WORKS, x.dtype  # some models cast to the dtype of a weight they ask
        output: Tensor = _Product.apply(x, self.weight, self.scale)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={E4M3}"


def to_fp8(x: Tensor, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """Rows ``[N, K]`` -> themselves over their scales, in fp8 and contiguous, and the scales ``[N, 1]`` (fp32)."""
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


# As operators, so that torch.compile and the trace of ``ptd plan`` see a product, whatever a device makes of it.
torch.library.define("ptd::fp8_linear", "(Tensor rows, Tensor row_scale, Tensor weight, Tensor scale) -> Tensor")
torch.library.define("ptd::fp8_linear_input", "(Tensor rows, Tensor row_scale, Tensor weight) -> Tensor")


@torch.library.impl("ptd::fp8_linear", "cuda")
def _linear_cuda(rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Rows ``[N, in]``, weight ``[out, in]`` -> bf16 ``[N, out]``; scales by row and by column in the epilogue."""
    return torch._scaled_mm(rows, weight.t(), scale_a=row_scale, scale_b=scale[None], out_dtype=torch.bfloat16)


@torch.library.impl("ptd::fp8_linear_input", "cuda")
def _linear_input_cuda(rows: Tensor, row_scale: Tensor, weight: Tensor) -> Tensor:
    """Rows ``[N, out]``, weight ``[out, in]`` -> bf16 ``[N, in]``.

    Hopper multiplies fp8 only where the summed dimension is contiguous on both sides: the weight is turned for it each
    time, at two bytes of traffic a weight. Keeping it both ways would need a second byte, as much as bf16.
    """
    turned = weight.t().contiguous()
    ones = row_scale.new_ones(1, weight.shape[1])
    return torch._scaled_mm(rows, turned.t(), scale_a=row_scale, scale_b=ones, out_dtype=torch.bfloat16)


# torch's own product in fp8 is about a thousand times slower than in fp32 on a CPU without fp8 instructions. In fp32
# the same fp8 numbers are multiplied exactly and summed as on a GPU, but for the order.
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
