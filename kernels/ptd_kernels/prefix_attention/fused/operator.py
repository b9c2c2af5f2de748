"""The Triton kernels as `torch.library` operators with an autograd formula: for eager, torch.compile and checkpointing.

Importing this module imports Triton, which then decides whether kernels are compiled, or interpreted with
TRITON_INTERPRET=1. Legend of shapes: problem.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.fused.backward import key_gradient_kernel, query_gradient_kernel
from ptd_kernels.prefix_attention.fused.forward import forward_kernel
from ptd_kernels.prefix_attention.fused.launch import (
    compute_delta,
    count_tiles,
    kernel_arguments,
    launch_kernel,
    launching_on,
    like_hugging_face,
    prefix_partials,
    strides_of,
)
from ptd_kernels.prefix_attention.segments.kernel import split_keys, unit_stride


@torch.library.custom_op("ptd_kernels::prefix_attention", mutates_args=())
def prefix_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, bias: Tensor | None,
    cu_seqlens: Tensor | None, prefix_index: Tensor | None, prefix_bounds: Tensor | None,
    scale: float, causal: bool, window: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return output ``[B, Hq, S, E]`` and log-sum-exp ``[B, Hq, S]`` (fp32; 0 for rows that see no key)."""
    B, Hq, S, _ = q.shape
    E = v.shape[3]
    out = like_hugging_face(B, Hq, S, E, like=q)
    lse = q.new_empty(B, Hq, S, dtype=torch.float32)
    if out.numel():
        common = kernel_arguments(
            q, k, v, prefix_k, prefix_v, bias, cu_seqlens, prefix_index, prefix_bounds, scale, causal, window, softcap,
        )  # fmt: skip
        common |= {"out": out, "lse": lse, **strides_of("out", "bhs", out)}
        with launching_on(q.device):
            launch_kernel(forward_kernel, "forward", lambda t: (count_tiles(S, t.rows, common), Hq, B), common, q)
    return out, lse


@prefix_attention_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, bias: Tensor | None,
    cu_seqlens: Tensor | None, prefix_index: Tensor | None, prefix_bounds: Tensor | None,
    scale: float, causal: bool, window: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, Hq, S, _ = q.shape
    return like_hugging_face(B, Hq, S, v.shape[3], like=q), q.new_empty(B, Hq, S, dtype=torch.float32)


@torch.library.custom_op("ptd_kernels::prefix_attention_backward", mutates_args=())
def prefix_attention_backward(
    dout: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, bias: Tensor | None,
    cu_seqlens: Tensor | None, prefix_index: Tensor | None, prefix_bounds: Tensor | None,
    scale: float, causal: bool, window: int | None, softcap: float | None,
    needs_q: bool, needs_own: bool, needs_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, prefix_k and prefix_v; those that are not needed are empty."""
    B, Hq, S, _ = q.shape
    Hkv, T = k.shape[1:3]
    dq, dk, dv, dprefix_k, dprefix_v = _gradients(q, k, v, prefix_k, prefix_v, needs_q, needs_own, needs_prefix)
    if not q.numel():
        return dq, dk.zero_(), dv.zero_(), dprefix_k.zero_(), dprefix_v.zero_()
    common = kernel_arguments(
        q, k, v, prefix_k, prefix_v, bias, cu_seqlens, prefix_index, prefix_bounds, scale, causal, window, softcap,
    )  # fmt: skip
    dout = unit_stride(dout)
    common |= {"out": out, "dout": dout, "lse": lse, "delta": torch.empty_like(lse)}
    common |= {**strides_of("out", "bhs", out), **strides_of("dout", "bhs", dout), **strides_of("dq", "bhs", dq)}
    with launching_on(q.device):
        compute_delta(common)
        if needs_q:
            common |= {"dq": dq}
            grid = lambda tile: (count_tiles(S, tile.rows, common), Hq, B)  # noqa: E731
            launch_kernel(query_gradient_kernel, "query_gradient", grid, common, q)
        if needs_own and T:
            own = common | {"dk": dk, "dv": dv, **strides_of("dk", "bht", dk), **strides_of("dv", "bht", dv)}
            grid = lambda tile: (count_tiles(T, tile.keys, common), Hkv, B)  # noqa: E731
            launch_kernel(key_gradient_kernel, "key_gradient", grid, own, q)
        if needs_prefix and common["P"]:
            total_k, total_v = split_keys(prefix_partials(common, q, Hkv).sum(0), dprefix_k, dprefix_v)
            dprefix_k.copy_(total_k)
            dprefix_v.copy_(total_v)
    return dq, dk, dv, dprefix_k, dprefix_v


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None,
    needs_q: bool, needs_own: bool, needs_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, Hq, S, D = q.shape
    Hkv, T, E = k.shape[1], k.shape[2], v.shape[3]
    dq, dk, dv, dprefix_k, dprefix_v = (q.new_empty(0, 0, 0, 0) for _ in range(5))
    if needs_q:
        dq = like_hugging_face(B, Hq, S, D, like=q)
    if needs_own:
        dk, dv = like_hugging_face(B, Hkv, T, D, like=k), like_hugging_face(B, Hkv, T, E, like=v)
    if needs_prefix and prefix_k is not None and prefix_v is not None:
        dprefix_k, dprefix_v = prefix_k.new_empty(prefix_k.shape), prefix_v.new_empty(prefix_v.shape)
    return dq, dk, dv, dprefix_k, dprefix_v


@prefix_attention_backward.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, bias: Tensor | None,
    cu_seqlens: Tensor | None, prefix_index: Tensor | None, prefix_bounds: Tensor | None,
    scale: float, causal: bool, window: int | None, softcap: float | None,
    needs_q: bool, needs_own: bool, needs_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(q, k, v, prefix_k, prefix_v, needs_q, needs_own, needs_prefix)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, causal, window, softcap = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.options = scale, causal, window, softcap


def _backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_q, needs_k, needs_v, needs_prefix_k, needs_prefix_v = ctx.needs_input_grad[:5]
    gradients = prefix_attention_backward(
        dout, *ctx.saved_tensors, *ctx.options, needs_q, needs_k or needs_v, needs_prefix_k or needs_prefix_v
    )
    needed = zip(gradients, ctx.needs_input_grad[:5], strict=True)
    return *(gradient if needs else None for gradient, needs in needed), *(None,) * 8


prefix_attention_forward.register_autograd(_backward, setup_context=_setup_context)
