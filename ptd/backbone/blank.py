"""A backbone from its config alone, without weights: for planning. Built inside ``FakeTensorMode``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from ptd.backbone.load import _CLASSES, _model_config, _readable, checkpoint_layers
from ptd.backbone.quantize import keep_differentiable, quantization_of
from ptd.config import BackboneConfig
from ptd.types import Output, UserError


def blank_model(
    config: BackboneConfig,
    output: Output = "causal_lm",
    *,
    check: Callable[[type[PreTrainedModel] | None, Any], None] = lambda model_class, model_config: None,
) -> PreTrainedModel:
    """The model that `ptd.backbone.load_model` would load, by its config: frozen, in eval mode, quantised.

    Its tensors have no data. With ``dtype: auto`` they have the config's dtype, float32 where that names none.
    Raises `UserError` for a config that cannot be read, and for checkpoints that other libraries have quantised.
    """
    model_config = _model_config(config)
    if getattr(model_config, "quantization_config", None) is not None:
        raise UserError(
            f"backbone.path: {config.path} is quantised already, and how its library runs it is not known here; plan "
            "for the checkpoint it was made from, with backbone.quantization"
        )
    for name, value in model_config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(model_config, name, 0.0)
    dtype = model_config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    auto_class, mapping = _CLASSES[output]
    model_class = mapping.get(type(model_config), None)
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    check(model_class, model_config)
    options: dict[str, Any] = {}
    if model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False
    quantized = quantization_of(config, model_config)
    with _readable(config):
        model = auto_class.from_config(
            model_config, dtype=dtype or torch.float32, trust_remote_code=config.trust_remote_code, **options
        )
        if quantized is not None:
            with unset_fake_temporarily():  # bitsandbytes' parameters are no subclass of what FakeTensorMode makes
                AutoHfQuantizer.from_config(quantized).preprocess_model(model, device_map={"": "cpu"})
            for module in list(model.modules()):
                _quantize(module, dtype or torch.float32)
    if output == "body" and model_config.is_encoder_decoder:
        model = model.get_encoder()
    model.requires_grad_(False)
    model.eval()
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    return keep_differentiable(model)


def _quantize(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a layer of bitsandbytes the tensors it has once its weight is quantised."""
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
