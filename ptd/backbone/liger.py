"""Liger's Triton kernels for the norms, MLPs and rotary embeddings of one frozen model (Hsu et al. 2024).

Liger's loss is not used: ptd has its own for a frozen output layer (`ptd_kernels.linear_cross_entropy`).
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from packaging.specifiers import SpecifierSet
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptd.backbone.residual_norm import fuse_residuals
from ptd.types import UserError

FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""``model_type`` of the families for which tests show that Liger changes neither logits nor gradients."""
RELEASES = SpecifierSet(">=0.8.5,<0.9")
"""Releases of Liger whose kernels have the arguments that ptd passes, and leave out the gradients of frozen weights."""
_ROTARY = "apply_rotary_pos_emb"
_INSTALL = "pip install 'ptd[gpu]'"


def liger_obstacle(model_type: str, device_type: str) -> tuple[str, str] | None:
    """Return why a model of this family cannot run in Liger's kernels here, and what to do; None if it can."""
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        return f"{model_type} is not among the families that ptd runs with Liger: {known}", ""
    if device_type != "cuda" and not interpreted():
        return "Liger's kernels need a GPU, but the backbone is on the CPU", ""
    try:
        found = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return "Liger is not installed", _INSTALL
    if not RELEASES.contains(found, prereleases=True):
        return f"Liger {found} is installed, but ptd needs a release {RELEASES}", f"{_INSTALL} --upgrade"
    return None


def interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_liger(model_type: str, device_type: str) -> None:
    """Raise `UserError` if Liger is not installed, cannot run on the device, or is not tested with the model family."""
    obstacle = liger_obstacle(model_type, device_type)
    if obstacle is not None:
        why, remedy = obstacle
        raise UserError(f"backbone.liger: {why}; {remedy + ', or ' if remedy else ''}set liger: false")


def use_liger(model: PreTrainedModel) -> PreTrainedModel:
    """Run RMSNorm, SwiGLU (GeGLU) and RoPE of this model in Liger's kernels; other models do not change.

    Liger's own function for an existing model gives the model's modules new forward methods, but also replaces classes
    in transformers' module, which would affect later models; this function restores them. For the rotary embedding
    Liger only replaces ``apply_rotary_pos_emb`` in transformers' module. This function instead gives the forward method
    of the model's attention its own namespace with Liger's function. Norms that follow an addition to the residual
    include the addition (`fuse_residuals`). Raises `UserError` if no attention module calls ``apply_rotary_pos_emb``.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    code = vars(sys.modules[type(model).__module__])
    names = dict(code)
    try:
        _apply_liger_kernel_to_instance(model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
    finally:
        code.update(names)
    rotated = [module for module in model.modules() if _rotate(module, rotary_embedding)]
    if not rotated:
        raise UserError(
            f"backbone.liger: the attention of {type(model).__name__} in this version of transformers does not call "
            f"{_ROTARY}, which Liger replaces; set liger: false"
        )
    fuse_residuals(model)
    return model


def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotate queries [B, Hq, S, D] and keys [B, H, S, D] by [B or 1, S, D], in their own memory if it is contiguous.

    Liger's own function would look for implementations in other kernel languages, and report each that is missing.
    """
    from liger_kernel.ops.rope import LigerRopeFunction

    found: tuple[Tensor, Tensor] = LigerRopeFunction.apply(q, k, cos, sin, None, unsqueeze_dim)
    return found


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
