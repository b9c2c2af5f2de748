"""torch.compile of a frozen backbone's layers, one by one, with attention left out."""

from __future__ import annotations

import importlib

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ptd.inject.attention import IMPLEMENTATION, MASKLESS, attention_forward
from ptd.types import UserError

RECOMPILE_LIMIT = 64
"""Graphs of one function. Layers share their code: kinds of layers, with gradients or without, add up."""


def compile_layers(model: PreTrainedModel) -> None:
    """Compile every layer in place (names and state stay), after a prompt was attached.

    Lengths are dynamic from the start, so that packed batches, all of which differ, share a graph. The first step
    compiles. Raises `UserError` without a C++ compiler (on a GPU: without Triton), with weights that are sharded,
    whose hooks do not compile, and with those that bitsandbytes has quantised.
    """
    if getattr(model, "is_quantized", False) or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UserError(
            "backbone.compile: only whole weights that bitsandbytes has not quantised are compiled; set compile: "
            "false, or sharding: none and quantization: none or fp8"
        )
    _check_compiler(next(model.parameters()).device)
    for name in (IMPLEMENTATION, MASKLESS):
        AttentionInterface.register(name, torch.compiler.disable(attention_forward))
    compile_each(model)


def compile_each(model: PreTrainedModel) -> None:
    """Compile the layers of any model as they are."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)


def _check_compiler(device: torch.device) -> None:
    """Before the model is used: inductor finds out within the first step, in a traceback of many pages."""
    if device.type == "cuda":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            raise UserError(f"backbone.compile: needs Triton on a GPU ({error}); set compile: false") from error
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise UserError(
            "backbone.compile: torch.compile found no C++ compiler; install one (Debian: apt install g++), name it in "
            "the environment variable CXX, or set compile: false"
        ) from error
