"""Merge the outputs and log-sum-exps of two segments: one Triton kernel on a GPU, else plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.fused.availability import refuses_unasked
from ptd_kernels.prefix_attention.segments.shared_keys import merge_segments


def merge_outputs(
    out: Tensor, lse: Tensor, prefix_out: Tensor, prefix_lse: Tensor, dtype: torch.dtype, *, plain: bool = False
) -> tuple[Tensor, Tensor]:
    """Return output ``[B, Hq, S, E]`` in `dtype` and log-sum-exp ``[B, Hq, S]`` over both segments.

    A segment's log-sum-exp is -inf for rows that see none of its keys; the result is 0 and 0 for rows that see no key.
    May overwrite `out`. `plain`: in plain torch, whatever the device.
    """
    if not plain and dtype != torch.float64 and refuses_unasked(out) is None:
        merged: tuple[Tensor, Tensor] = merge_segments(out, lse, prefix_out, prefix_lse, dtype)
        return merged
    # A sequence without a prefix has prefix_lse -inf; the prefix's share is 0, even if all own keys are hidden.
    prefix_share = torch.sigmoid(prefix_lse - lse).masked_fill_(prefix_lse == -torch.inf, 0.0)[..., None]
    out = out.to(prefix_share.dtype).lerp_(prefix_out.to(prefix_share.dtype), prefix_share)
    return out.to(dtype), finite_sums(torch.logaddexp(lse, prefix_lse))


def finite_sums(lse: Tensor) -> Tensor:
    """Return `lse` with 0 for rows that see no key: their weights exp(-inf - lse) must be 0, not NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)
