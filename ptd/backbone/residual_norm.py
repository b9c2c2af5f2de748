"""Add to the residual and normalise the sum in one kernel: the layers of one frozen model, around Liger's kernels.

A layer normalises its residual stream twice, and adds to it twice. Written out, autograd adds the gradients of the norm
and of the residual in a kernel of its own. Liger's kernel for a residual with its norm (Hsu et al. 2024) does both in
one pass, forward and backward, but Liger gives it to no model. Its backward kernel also serves the first norm of a
layer, to whose input nothing is added.
"""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import Any

from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_ATTENTION, _MLP, _FIRST, _AFTER = "self_attn", "mlp", "input_layernorm", "post_attention_layernorm"
_BEFORE_MLP, _AFTER_MLP = "pre_feedforward_layernorm", "post_feedforward_layernorm"
_FORWARD: dict[tuple[str, ...], str] = {
    (_FIRST, _ATTENTION, _AFTER, _MLP): _AFTER,
    (_FIRST, _ATTENTION, "resid_attn_dropout", _AFTER, _MLP, "resid_mlp_dropout"): _AFTER,
    (_FIRST, _ATTENTION, _AFTER, _BEFORE_MLP, _MLP, _AFTER_MLP): _BEFORE_MLP,
}
"""The attributes that a layer's forward method uses, in order -> the norm whose input is the sum with the attention's
output. A method that uses any other attribute may compute something else."""


def fuse_residuals(model: PreTrainedModel) -> int:
    """Let the layers of this model add and normalise in one kernel; return how many do.

    `use_liger` has replaced their norms before. A layer whose forward method is not one of those known stays as it is.
    """
    fused = 0
    for layer in model.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        second = _FORWARD.get(inspect.unwrap(type(layer).forward).__code__.co_names)
        if second is None:
            continue
        first, norm = layer.get_submodule(_FIRST), layer.get_submodule(second)
        first.forward = MethodType(_normalise, first)
        norm.forward = MethodType(_add_and_normalise, norm)
        cls: Any = type(layer)
        layer.__class__ = _fused_class(cls, second)
        fused += 1
    return fused


@functools.cache
def _fused_class(cls: Any, second: str) -> Any:
    """Return the class with another forward method. It is a class, because transformers wraps the method of a class for
    gradient checkpointing, in some releases, and calls the method of an instance without that."""
    return type(cls.__name__, (cls,), {"forward": _sandwiched if second == _BEFORE_MLP else _plain})


def _plain(layer: Any, hidden_states: Tensor, **options: Any) -> Tensor:
    """Compute a layer of Llama: a norm before its attention, and one before its MLP. ``hidden_states``: [B, S, H]."""
    normed, residual = layer.input_layernorm(hidden_states)
    update, _ = layer.self_attn(hidden_states=normed, **options)
    normed, residual = layer.post_attention_layernorm(update, residual)
    found: Tensor = residual + layer.mlp(normed)
    return found


def _sandwiched(layer: Any, hidden_states: Tensor, **options: Any) -> Tensor:
    """Compute a layer of Gemma 2 and 3: norms before and after its attention, and before and after its MLP."""
    normed, residual = layer.input_layernorm(hidden_states)
    update, _ = layer.self_attn(hidden_states=normed, **options)
    normed, residual = layer.pre_feedforward_layernorm(layer.post_attention_layernorm(update), residual)
    found: Tensor = residual + layer.post_feedforward_layernorm(layer.mlp(normed))
    return found


def _normalise(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norm of ``x`` [B, S, H], and ``x``."""
    found: tuple[Tensor, Tensor] = _Norm.apply(x, norm.weight, norm.variance_epsilon, norm.offset, norm.casting_mode)
    return found


def _add_and_normalise(norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norm of ``x`` + ``residual`` [B, S, H], and this sum."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    # In place: the gradient of the normalised sum, which nobody else reads, becomes that of both summands.
    found: tuple[Tensor, Tensor] = LigerFusedAddRMSNormFunction.apply(
        x, residual, norm.weight, norm.variance_epsilon, norm.offset, norm.casting_mode, True
    )
    return found


class _Norm(Function):
    """x -> norm(x), x. The gradient of both outputs goes through one kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, epsilon: float, offset: float, casting: str
    ) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.rms_norm import rms_norm_forward

        x = x.contiguous()
        y, flat, rstd, *settings = rms_norm_forward(x, weight, epsilon, offset, casting, True)
        ctx.save_for_backward(flat, weight, rstd)
        ctx.settings = offset, *settings
        return y, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dx: Tensor) -> tuple[Tensor | None, ...]:
        from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_backward

        offset, block, warps, casting = ctx.settings
        flat, weight, rstd = ctx.saved_tensors
        gradient, _, _ = fused_add_rms_norm_backward(
            dy.contiguous(), dx.contiguous(), flat, weight, rstd, offset, casting, block, warps, 2, True, needs_dw=False
        )
        return gradient, None, None, None, None
