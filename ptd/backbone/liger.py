"""Liger's Triton kernels for the norms, MLPs and rotary embeddings of one frozen model (Hsu et al. 2024).

Liger's loss is not used: ptd has its own for a frozen output layer (`ptd_kernels.linear_cross_entropy`).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ptd.types import UserError

FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""``model_type`` of the families for which tests show that Liger changes neither logits nor gradients."""
_ROTARY = "apply_rotary_pos_emb"


def check_liger(model_type: str, device: torch.device) -> None:
    """Raise `UserError` if Liger is not installed, cannot run on ``device``, or is not tested with the model family."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("backbone.liger: Liger is not installed; pip install 'ptd[gpu]', or set liger: false")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("backbone.liger: Liger's kernels need a GPU, but the backbone is on the CPU; set liger: false")
    if model_type not in FAMILIES:
        raise UserError(
            f"backbone.liger: {model_type} is not among the families that ptd runs with Liger: {', '.join(FAMILIES)}; "
            "set liger: false"
        )


def use_liger(model: PreTrainedModel) -> PreTrainedModel:
    """Run RMSNorm, SwiGLU (GeGLU) and RoPE of this model in Liger's kernels; other models do not change.

    Liger's own function for an existing model gives the model's modules new forward methods, but also replaces classes
    in transformers' module, which would affect later models; this function restores them. For the rotary embedding
    Liger only replaces ``apply_rotary_pos_emb`` in transformers' module. This function instead gives the forward method
    of the model's attention its own namespace with Liger's function. Raises `UserError` if no attention module calls
    ``apply_rotary_pos_emb``.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    code = vars(sys.modules[type(model).__module__])
    names = dict(code)
    try:
        _apply_liger_kernel_to_instance(model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
    finally:
        code.update(names)
    rotated = [module for module in model.modules() if _rotate(module, liger_rotary_pos_emb)]
    if not rotated:
        raise UserError(
            f"backbone.liger: the attention of {type(model).__name__} in this version of transformers does not call "
            f"{_ROTARY}, which Liger replaces; set liger: false"
        )
    return model


def _rotate(module: nn.Module, rotary: Callable[..., Any]) -> bool:
    """Make ``module`` rotate queries and keys with ``rotary``; return whether it rotates them at all."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return False
    namespace = {**forward.__globals__, _ROTARY: rotary}
    own = FunctionType(forward.__code__, namespace, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(own, module)
    return True
