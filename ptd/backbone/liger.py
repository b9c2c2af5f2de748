"""Liger's Triton kernels for the norms, MLPs and rotary embeddings of one frozen model (Hsu et al. 2024).

The loss is not Liger's: ptd has its own for a frozen output layer (ptd_kernels/linear_cross_entropy.py).
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
"""``model_type`` of those whose logits and gradients with Liger are tested to be the same."""
_ROTARY = "apply_rotary_pos_emb"


def check_liger(model_type: str, device: torch.device) -> None:
    """Raises `UserError` where Liger is not installed, cannot run on ``device``, or does not know the model."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("backbone.liger: Liger is not installed; pip install 'ptd[gpu]', or set liger: false")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("backbone.liger: its kernels need a GPU, and the backbone is on the CPU; set liger: false")
    if model_type not in FAMILIES:
        raise UserError(
            f"backbone.liger: {model_type} is not among the architectures it is used for: {', '.join(FAMILIES)}; set "
            "liger: false"
        )


def use_liger(model: PreTrainedModel) -> PreTrainedModel:
    """Let RMSNorm, SwiGLU (GeGLU) and RoPE of this model run in Liger's kernels; other models stay as they are.

    Liger's own function for a model that is there already gives its modules new forward methods, and by the way
    replaces classes in transformers' module for models to come: that is taken back. Of the rotary embedding it knows
    the latter only: here the attention's forward gets a namespace of its own, with Liger's function in it.
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
    """Whether ``module`` rotates queries and keys; from now on it does so with ``rotary``."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return False
    namespace = {**forward.__globals__, _ROTARY: rotary}
    own = FunctionType(forward.__code__, namespace, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(own, module)
    return True
