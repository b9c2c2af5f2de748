"""Triton kernels of our own (fused/) for a segment whose keys all rows see: the prefix, its gradient above all.

They sum dk and dv in fp32 over all rows and over the query heads of a group, which no flash kernel of a library does,
and add dq to the own keys' dq in place. As `torch.library` operators they also run on tensors without data, and where
Triton is missing, importing this module does not import it. Legend of shapes: problem.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.fused.availability import refuses_unasked
from ptd_kernels.prefix_attention.segments.kernel import HALF, Gradients, Kernel, Need, Pair, Rule, split_keys


@torch.library.custom_op("ptd_kernels::shared_keys", mutates_args=())
def shared_keys_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Return output ``[1, Hq, S, E]`` and log-sum-exp ``[1, Hq, S]`` over ``k`` and ``v``, of one key or more."""
    from ptd_kernels.prefix_attention.fused.segment import launch_shared_forward

    return launch_shared_forward(q, k, v, scale, softcap)


@shared_keys_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    B, Hq, S, _ = q.shape
    out = q.new_empty(B, S, Hq, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(B, Hq, S, dtype=torch.float32)


@torch.library.custom_op("ptd_kernels::shared_keys_backward", mutates_args={"dq"})
def shared_keys_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor | None, adds: bool,
    scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Return dk ``[P, Hkv, D]`` and dv in one flat fp32 tensor; write q's gradient to `dq` (`adds`: add it)."""
    from ptd_kernels.prefix_attention.fused.segment import launch_shared_gradient

    return launch_shared_gradient(dout, q, k, v, out, lse, dq, adds, scale, softcap)


@shared_keys_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor | None, adds: bool,
    scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    return k.new_empty(k.numel() + v.numel(), dtype=torch.float32)


@torch.library.custom_op("ptd_kernels::merge_segments", mutates_args=())
def merge_segments(
    first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return output ``[B, Hq, S, E]`` in `dtype` and log-sum-exp ``[B, Hq, S]`` over both segments.

    A segment's log-sum-exp is -inf for rows that see none of its keys; the result is 0 and 0 for rows that see no key.
    """
    from ptd_kernels.prefix_attention.fused.segment import launch_merge

    out, lse = _merged(first, dtype)
    launch_merge(first, first_lse, second, second_lse, out, lse)
    return out, lse


@merge_segments.register_fake
def _(
    first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _merged(first, dtype)


def _merged(like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    B, Hq, S, E = like.shape
    out = like.new_empty(B, S, Hq, E, dtype=dtype).transpose(1, 2)
    return out, like.new_empty(B, Hq, S, dtype=torch.float32)


def _forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    out, lse = shared_keys_forward(q, k, v, rule.scale, rule.softcap)
    return out, lse


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule) -> Gradients:
    B, Hq, S, D = q.shape
    dq = q.new_empty(B, S, Hq, D).transpose(1, 2)
    both = shared_keys_backward(dout, q, k, v, out, lse, dq, False, rule.scale, rule.softcap)
    dk, dv = split_keys(both, k[0], v[0])
    return Gradients(dq, dk[None], dv[None])


def _add_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule, dq: Tensor | None
) -> Pair:
    if dq is not None and dq.stride(3) != 1:  # the kernels write rows of consecutive numbers
        share = _backward(dout, q, k, v, out, lse, rule)
        dq += share.q
        return share.k, share.v
    both = shared_keys_backward(dout, q, k, v, out, lse, dq, True, rule.scale, rule.softcap)
    dk, dv = split_keys(both, k[0], v[0])
    return dk[None], dv[None]


def _refuses(need: Need) -> str | None:
    rule = need.rule
    if need.q.dtype not in HALF:
        return f"its tiles are for the tensor cores in fp16 and bf16, not for {need.q.dtype}"
    bounded = any(part is not None for part in rule._replace(scale=0.0, softcap=None)[1:])
    if bounded or need.q.shape[0] != 1 or need.keys == 0:
        return "it supports only keys that all rows see (the prefix)"
    return refuses_unasked(need.q)


SHARED_KEYS = Kernel(
    "own Triton kernels, shared keys", _forward, _backward, _refuses, max_rows=None, add_backward=_add_backward
)
