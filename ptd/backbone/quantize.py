"""Frozen weights in 8 or 4 bits, with bitsandbytes: weights are loaded in that form, and gradients flow through them.

8-bit floating point is in fp8.py.
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
    """Return the quantisation settings for ``from_pretrained``; None: load the weights in the checkpoint's own form.

    ``int8``: LLM.int8() (Dettmers et al. 2022); ``nf4``: 4-bit NormalFloat with double quantisation (QLoRA, Dettmers et
    al. 2023), multiplied in the backbone's dtype. Raises `UserError` if bitsandbytes is missing, if a checkpoint that
    is to be quantised is already quantised, and if a checkpoint in a form that cannot be ``sharded`` is to be sharded.
    """
    saved = getattr(model_config, "quantization_config", None)
    if saved is not None and sharded and not _is_4bit(saved):
        raise UserError(
            f"backbone.sharding: {config.path} is quantised in a form that cannot be sharded; set sharding: none, or "
            "use the unquantised checkpoint with quantization: nf4"
        )
    if config.quantization == "none":
        return None
    if saved is not None:
        raise UserError(
            f"backbone.quantization: {config.path} is already quantised and keeps its own format; set quantization: "
            "none"
        )
    if config.quantization == "fp8":
        return None  # `ptd.backbone.fp8.quantise` quantises after loading
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
    """Replace the forward pass of the 4-bit layers by one with correct gradients in every setting.

    bitsandbytes' own forward pass (0.50.2) has two problems. On a CPU a pass without gradients repacks the weights;
    gradients are zero from then on (the prompt's gradient was exactly 0, without an error). And it keeps the weight
    that it used until backward, which under ZeRO-3 is the gathered weight.
    """
    if importlib.util.find_spec("bitsandbytes") is not None:
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.forward = partial(_linear4bit, module)


def _linear4bit(layer: Any, x: Tensor) -> Tensor:
    """Do what bitsandbytes' ``Linear4bit.forward`` does: ``[…, in]`` -> ``[…, out]`` in the dtype of ``x``."""
    output: Tensor = _MatMul4Bit.apply(x.to(layer.compute_dtype or x.dtype), layer)
    if layer.bias is not None:
        output = output + layer.bias.to(output.dtype)
    return output.to(x.dtype)


class _MatMul4Bit(torch.autograd.Function):
    """``x Wᵀ`` with a frozen 4-bit W. Backward, ``dx = dy W``, reads W from its layer again."""

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
    """Return the layer's weight ``[out, in]`` in the dtype from which it was quantised.

    The weight is dequantised as one long row, because its blocks continue across the rows of the matrix. On a CPU with
    AVX-512, bitsandbytes (0.50.2) begins a new block with each row of a matrix, which gives wrong weights if ``in`` is
    not a multiple of the block size, 64.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = copy(layer.weight.quant_state)
    shape = state.shape
    state.shape = torch.Size((shape.numel(),))
    weight: Tensor = dequantize_4bit(layer.weight.data, state)
    return weight.view(shape)
