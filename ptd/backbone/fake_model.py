"""Build a backbone from its config alone, with placeholder weights, for planning. Runs inside ``FakeTensorMode``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from ptd.backbone.fp8 import quantise
from ptd.backbone.fusion import choose_fusion
from ptd.backbone.liger import use_liger
from ptd.backbone.load import Blueprint, Check, dtype_of, frozen, readable
from ptd.backbone.quantize import quantization_of
from ptd.config import BackboneConfig
from ptd.types import Output, UserError


def blank_model(
    config: BackboneConfig,
    output: Output = "causal_lm",
    *,
    device_type: str = "cpu",
    check: Check = lambda model_class, model_config: None,
) -> PreTrainedModel:
    """Return the model that `ptd.backbone.load_model` would load on ``cuda`` or ``cpu``: frozen, in eval mode,
    quantised as configured, and with Liger's kernels if they would be used there.

    Its tensors have no data. With ``dtype: auto`` they have the config's dtype, or float32 if the config names none.
    Raises `UserError` if the config cannot be read or the checkpoint is already quantised.
    """
    built_as = Blueprint.of(config, output, check)
    if getattr(built_as.config, "quantization_config", None) is not None:
        raise UserError(
            f"backbone.path: {config.path} is already quantised, and ptd plan does not know how its library runs it; "
            "plan with the unquantised checkpoint and backbone.quantization"
        )
    fusion = choose_fusion(config, built_as.config.model_type, device_type)
    dtype = dtype_of(config)
    quantized = quantization_of(config, built_as.config)
    with readable(config):
        model = built_as.auto_class.from_config(
            built_as.config, dtype=dtype, trust_remote_code=config.trust_remote_code, **built_as.options
        )
    if quantized is not None:
        with unset_fake_temporarily():  # bitsandbytes' parameter classes do not work with fake tensors
            AutoHfQuantizer.from_config(quantized).preprocess_model(model, device_map={"": "cpu"})
            _fill_caches()
        for module in list(model.modules()):
            _quantize(module, dtype)
    model = frozen(model, config, output)
    if config.quantization == "fp8":
        quantise(model, torch.device("cpu"))
    return use_liger(model) if fusion.by == "liger" else model


def _fill_caches() -> None:
    """Make bitsandbytes create its code tables with real numbers: it keeps the first tables until the process ends."""
    from bitsandbytes import functional

    unequal = torch.linspace(-1, 1, 64 * 64).view(64, 64)  # bitsandbytes 0.48 crashes if all blocks have the same scale
    packed, state = functional.quantize_4bit(unequal, compress_statistics=True, quant_type="nf4")
    functional.dequantize_4bit(packed, state)


def _quantize(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a bitsandbytes layer the tensors that it has after its weight is quantised."""
    from bitsandbytes import functional
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    if not isinstance(module, Linear4bit | Linear8bitLt):
        return
    source = torch.empty(module.out_features, module.in_features, dtype=dtype)
    if module.bias is not None:
        module.bias = nn.Parameter(torch.empty(module.out_features, dtype=dtype), requires_grad=False)
    if isinstance(module, Linear4bit):
        settings: Any = module.weight
        packed, module.quant_state = functional.quantize_4bit(
            source, compress_statistics=settings.compress_statistics, quant_type=settings.quant_type
        )
        weight: Any = nn.Parameter(packed, requires_grad=False)
        weight.quant_state = module.quant_state
    else:
        module.state.CB = torch.empty_like(source, dtype=torch.int8)
        module.state.SCB = torch.empty(module.out_features, dtype=torch.float32)
        weight = nn.Parameter(module.state.CB, requires_grad=False)
        weight.CB = weight.SCB = None
    module.weight = weight
