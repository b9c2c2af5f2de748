"""Frozen weights in 8 or 4 bits, through bitsandbytes: they are read in that form, and gradients pass through them."""

from __future__ import annotations

import importlib.util
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from ptd.config import BackboneConfig
from ptd.types import DTYPES, UserError

T = TypeVar("T", bound=nn.Module)


def quantization_of(config: BackboneConfig, model_config: Any) -> BitsAndBytesConfig | None:
    """What ``from_pretrained`` is to be told; None for weights as they are (a quantised checkpoint stays what it is).

    ``int8``: LLM.int8() (Dettmers et al. 2022); ``nf4``: 4-bit NormalFloat with double quantisation (QLoRA, Dettmers et
    al. 2023), multiplied in the backbone's dtype. Raises `UserError` without bitsandbytes, or for a checkpoint that is
    quantised already.
    """
    if config.quantization == "none":
        return None
    if getattr(model_config, "quantization_config", None) is not None:
        raise UserError(
            f"backbone.quantization: {config.path} is quantised already and loads as it is; set quantization: none"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"backbone.quantization: {config.quantization} needs bitsandbytes; pip install 'ptd[quant]'")
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=config.int8_threshold)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES.get(config.dtype) or model_config.dtype or torch.float32,
    )


def keep_differentiable(model: T) -> T:
    """On a CPU bitsandbytes repacks 4-bit weights in a pass without gradients; the gradients behind them are zero then.

    Takes that path away from every layer (with 0.50.2 the prompt's gradient was exactly 0, without an error).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.__dict__["support_avx512bf16_for_cpu"] = False
    return model
