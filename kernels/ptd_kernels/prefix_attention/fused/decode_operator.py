"""The decode kernel as a `torch.library` operator without gradients: for eager, torch.compile and CUDA graphs.

No call waits for the device. Importing this module imports Triton. Legend of shapes: problem.py.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ptd_kernels.prefix_attention.fused.decode import decode_kernel, merge_splits_kernel
from ptd_kernels.prefix_attention.fused.launch import (
    WAVES,
    device_facts,
    kernel_arguments,
    launching_on,
    like_hugging_face,
    run_kernel,
    strides_of,
)
from ptd_kernels.prefix_attention.fused.tile_table import decode_tile

_SPLIT_TILES = 2
"""The smallest number of key tiles per split."""
_MERGED = 16
"""Splits that a merge loads at a time."""


@torch.library.custom_op("ptd_kernels::prefix_attention_decode", mutates_args=())
def prefix_attention_decode(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, bias: Tensor | None,
    prefix_index: Tensor | None, prefix_bounds: Tensor | None,
    scale: float, causal: bool, window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Return output ``[B, Hq, S, E]`` for few queries (`decodes`), without gradients. A boolean `bias` is a mask.

    The keys are split over enough programs to fill the device.
    """
    B, Hq, S, _ = q.shape
    out = like_hugging_face(B, Hq, S, v.shape[3], like=q)
    if not out.numel():
        return out
    common = kernel_arguments(
        q, k, v, prefix_k, prefix_v, bias, None, prefix_index, prefix_bounds, scale, causal, window, softcap,
    )  # fmt: skip
    architecture, multiprocessors = device_facts(q.device)
    tile = decode_tile(S * common["group"], architecture, q.dtype != torch.float32, max(common["D"], common["E"]))
    programs, keys = B * k.shape[1], common["T"] + common["P"] // max(1, common["num_prefixes"])
    splits = max(1, min(triton.cdiv(WAVES * multiprocessors, programs), triton.cdiv(keys, _SPLIT_TILES * tile.keys)))
    of_out = strides_of("out", "bhs", out)
    common |= {"out": out, "lse": out, **of_out, "SPLIT": splits > 1}
    if splits > 1:
        common |= {"out": q.new_empty(splits, B, Hq, S, common["E"], dtype=torch.float32)}
        common |= {"lse": q.new_empty(splits, B, Hq, S, dtype=torch.float32)}
    with launching_on(q.device):
        run_kernel(decode_kernel, (splits, k.shape[1], B), common, tile)
        if splits > 1:
            sizes = {"E": common["E"], "BLOCK_E": common["BLOCK_E"], "BLOCK_C": _MERGED}
            merge_splits_kernel[(S, Hq, B)](common["out"], common["lse"], out, **of_out, splits=splits, S=S, **sizes)
    return out


@prefix_attention_decode.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, bias: Tensor | None,
    prefix_index: Tensor | None, prefix_bounds: Tensor | None,
    scale: float, causal: bool, window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    return like_hugging_face(q.shape[0], q.shape[1], q.shape[2], v.shape[3], like=q)
