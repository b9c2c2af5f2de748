"""Compile a frozen backbone's layers with torch.compile, one by one, without their attention."""

from __future__ import annotations

import importlib

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ptd.inject.attention import IMPLEMENTATION, MASKLESS, attention_forward
from ptd.types import UserError, is_partitioned

RECOMPILE_LIMIT = 64
"""Graphs per function. Layers share their code, so each kind of layer, with and without gradients, adds graphs."""


def compile_layers(model: PreTrainedModel) -> None:
    """Compile every layer in place (names and state stay the same), after a prompt was attached.

    Lengths are dynamic from the start, so that packed batches, all of which differ in length, share a graph. The first
    step compiles. Raises `UserError` without a C++ compiler, on a GPU also without Triton; for sharded weights, whose
    hooks do not compile; and for weights that bitsandbytes has quantised.
    """
    if getattr(model, "is_quantized", False) or any(map(is_partitioned, model.parameters())):
        raise UserError(
            "backbone.compile: weights that are sharded or quantised by bitsandbytes cannot be compiled; set compile: "
            "false, or sharding: none and quantization: none or fp8"
        )
    _check_compiler(next(model.parameters()).device)
    for name in (IMPLEMENTATION, MASKLESS):
        AttentionInterface.register(name, torch.compiler.disable(attention_forward))
    compile_each(model)


def compile_each(model: PreTrainedModel) -> None:
    """Compile the layers of any model in place, without the checks and changes of `compile_layers`."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)


def _check_compiler(device: torch.device) -> None:
    """Raise `UserError` if a compiler is missing, before the model is used.

    Inductor would fail only within the first step, with a traceback of many pages.
    """
    if device.type == "cuda":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            raise UserError(
                f"backbone.compile: torch.compile needs Triton on a GPU ({error}); install it, or set compile: false"
            ) from error
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise UserError(
            "backbone.compile: torch.compile found no C++ compiler; install one (Debian: apt install g++), name it in "
            "the environment variable CXX, or set compile: false"
        ) from error
