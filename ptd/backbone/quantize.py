"""Frozen weights in 8 or 4 bits, through bitsandbytes: they are read in that form, and gradients pass through them.

Floating point of 8 bits is another matter: fp8.py.
"""

from __future__ import annotations

import importlib.util
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from ptd.config import BackboneConfig
from ptd.types import DTYPES, UserError


def quantization_of(config: BackboneConfig, model_config: Any, *, sharded: bool = False) -> BitsAndBytesConfig | None:
    """What ``from_pretrained`` is to be told; None for weights as they are (a quantised checkpoint stays what it is).

    ``int8``: LLM.int8() (Dettmers et al. 2022); ``nf4``: 4-bit NormalFloat with double quantisation (QLoRA, Dettmers et
    al. 2023), multiplied in the backbone's dtype. Raises `UserError` without bitsandbytes, for a checkpoint that is
    quantised already, and for one that is in a form that cannot be ``sharded``.
    """
    saved = getattr(model_config, "quantization_config", None)
    if saved is not None and sharded and not _is_4bit(saved):
        raise UserError(
            f"backbone.sharding: {config.path} is quantised in a form that cannot be sharded; set sharding: none, or "
            "take the unquantised checkpoint with quantization: nf4"
        )
    if config.quantization == "none":
        return None
    if saved is not None:
        raise UserError(
            f"backbone.quantization: {config.path} is quantised already and loads as it is; set quantization: none"
        )
    if config.quantization == "fp8":
        return None  # `ptd.backbone.fp8.quantise` does it, behind the loading
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"backbone.quantization: {config.quantization} needs bitsandbytes; pip install 'ptd[quant]'")
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=config.int8_threshold)
    dtype = DTYPES.get(config.dtype) or model_config.dtype or torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _is_4bit(saved: Any) -> bool:
    settings = saved if isinstance(saved, dict) else saved.to_dict()
    return bool(settings.get("load_in_4bit"))


def keep_differentiable(model: nn.Module) -> None:
    """Give the 4-bit layers a forward pass through which gradients pass in every setting.

    bitsandbytes' own (0.50.2) repacks weights on a CPU in a pass without gradients, behind which they are zero then
    (the prompt's gradient was exactly 0, without an error); and it keeps the weight it was given until backward, which
    under ZeRO-3 is the gathered one.
    """
    if importlib.util.find_spec("bitsandbytes") is not None:
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.forward = partial(_linear4bit, module)


def _linear4bit(layer: Any, x: Tensor) -> Tensor:
    """bitsandbytes' ``Linear4bit.forward``: ``[…, in]`` -> ``[…, out]`` in the dtype of ``x``."""
    output: Tensor = _MatMul4Bit.apply(x.to(layer.compute_dtype or x.dtype), layer)
    if layer.bias is not None:
        output = output + layer.bias.to(output.dtype)
    return output.to(x.dtype)


class _MatMul4Bit(torch.autograd.Function):
    """``x Wᵀ`` with a frozen 4-bit W that is looked up in its layer again for backward: ``dx = dy W``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        import bitsandbytes

        ctx.layer = layer
        output: Tensor
        if x.device.type == "cpu":
            output = x @ _dequantised(layer).to(x.dtype).t()
        else:
            output = bitsandbytes.matmul_4bit(x, layer.weight.t(), quant_state=layer.weight.quant_state)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ _dequantised(ctx.layer).to(gradient.dtype), None


def _dequantised(layer: Any) -> Tensor:
    """The layer's weight ``[out, in]`` in the dtype that it was quantised from.

    As one long row, over which its blocks run: bitsandbytes (0.50.2) on a CPU with AVX-512 begins a new block with each
    row of a matrix, and so gives other weights wherever ``in`` is no multiple of the block's 64.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = copy(layer.weight.quant_state)
    shape = state.shape
    state.shape = torch.Size((shape.numel(),))
    weight: Tensor = dequantize_4bit(layer.weight.data, state)
    return weight.view(shape)
