"""Frozen linear layers in 8-bit floating point, forward and backward (experimental).

`ptd_kernels.fp8_linear` has the products and their maths.
"""

from __future__ import annotations

import torch
from ptd_kernels.fp8_linear import E4M3, MULTIPLE, fp8_linear, to_fp8
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ptd.types import UserError

CAPABILITY = (8, 9)
"""Lowest compute capability of an NVIDIA GPU that multiplies in fp8: Ada has 8.9, Hopper 9.0."""
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
        output = fp8_linear(x, self.weight, self.scale)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={E4M3}"
