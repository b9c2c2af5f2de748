"""Launch the Triton kernels for `merge`: a segment whose keys all rows see, and the merge of two segments' outputs.

Tiles are never timed here (tuning.py): the results of `merge` do not depend on a measurement, and a kernel that adds to
dQ may run only once. Legend of shapes: problem.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ptd_kernels.prefix_attention.fused.backward import query_gradient_kernel
from ptd_kernels.prefix_attention.fused.forward import forward_kernel
from ptd_kernels.prefix_attention.fused.launch import (
    compute_delta,
    count_tiles,
    device_facts,
    kernel_arguments,
    launch_kernel,
    launching_on,
    like_hugging_face,
    prefix_partials,
    run_kernel,
    split_rows,
    strides_of,
)
from ptd_kernels.prefix_attention.fused.merge import merge_kernel
from ptd_kernels.prefix_attention.fused.short_prefix import short_prefix_kernel
from ptd_kernels.prefix_attention.fused.tile_table import MERGE, short_prefix_tile
from ptd_kernels.prefix_attention.fused.tiles import padded
from ptd_kernels.prefix_attention.segments.kernel import unit_stride


def launch_shared_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return output ``[B, Hq, S, E]`` and log-sum-exp ``[B, Hq, S]`` over keys that all rows see."""
    B, Hq, S, _ = q.shape
    out = like_hugging_face(B, Hq, S, v.shape[3], like=q)
    lse = q.new_empty(B, Hq, S, dtype=torch.float32)
    none = None, None, None, None, None, None
    common = kernel_arguments(q, k, v, *none, scale, False, None, softcap)
    common |= {"out": out, "lse": lse, **strides_of("out", "bhs", out)}
    with launching_on(q.device):
        grid = lambda tile: (count_tiles(S, tile.rows, common), Hq, B)  # noqa: E731
        launch_kernel(forward_kernel, "forward", grid, common, q, timed=False)
    return out, lse


def launch_shared_gradient(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor | None, adds: bool,
    scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Write q's gradient to `dq` (`adds`: add it; None: do not compute it); return dk and dv, flat (`split_keys`).

    ``q``: ``[1, Hq, S, D]``; ``k``, ``v``: ``[1, Hkv, P, …]``, of which every row sees every key; ``out``, ``lse``:
    over all segments. Few keys take one kernel; more keys take three, for delta, dQ, and dK and dV (backward.py).
    """
    none = None, None, None, None
    own_k, own_v = k[:, :, :0], v[:, :, :0]
    common = kernel_arguments(q, own_k, own_v, k[0], v[0], *none, scale, False, None, softcap)
    dout, out, lse = unit_stride(dout), unit_stride(out), lse.contiguous()
    common |= {"out": out, "dout": dout, "lse": lse, "dq": q if dq is None else dq, "ADD": adds}
    common |= {**strides_of("out", "bhs", out), **strides_of("dout", "bhs", dout)}
    common |= strides_of("dq", "bhs", q if dq is None else dq)
    with launching_on(q.device):
        partial = _short_prefix(common, q, k.shape[1], dq is not None)
        if partial is None:
            common["delta"] = torch.empty_like(lse)
            compute_delta(common)
            if dq is not None:
                grid = lambda tile: (count_tiles(q.shape[2], tile.rows, common), q.shape[1], 1)  # noqa: E731
                launch_kernel(query_gradient_kernel, "query_gradient", grid, common, q, timed=False)
            partial = prefix_partials(common, q, k.shape[1], timed=False)
    return partial[0] if partial.shape[0] == 1 else partial.sum(0)


def _short_prefix(common: dict[str, Any], q: Tensor, Hkv: int, queries: bool) -> Tensor | None:
    """Return the partial sums of `short_prefix_kernel`, or None if the keys do not fit into one of its tiles."""
    P, D, E = common["P"], common["D"], common["E"]
    architecture, _ = device_facts(q.device)
    tile = short_prefix_tile(P, architecture, max(D, E))
    if tile is None or (architecture and q.dtype == torch.float32):
        return None
    tiles = triton.cdiv(q.shape[2], tile.rows)
    items = common["group"] * tiles
    splits = split_rows(items, Hkv, q)
    partial = q.new_empty(splits, P * Hkv * (D + E), dtype=torch.float32)
    arguments = common | {"partial": partial, "tiles": tiles, "last_item": items, "QUERIES": queries}
    run_kernel(short_prefix_kernel, (Hkv, splits), arguments, tile)
    return partial


def launch_merge(
    first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor, out: Tensor, lse: Tensor
) -> None:
    """Write to `out` ``[B, Hq, S, E]`` and `lse` ``[B, Hq, S]`` (contiguous) the merge of two segments."""
    B, Hq, S, E = out.shape
    first, second = unit_stride(first), unit_stride(second)
    arguments = {
        "first_out": first, "first_lse": first_lse, "second_out": second, "second_lse": second_lse,
        "out": out, "lse": lse, **strides_of("out", "bhs", out), "S": S, "E": E, "BLOCK_E": padded(E),
        **strides_of("first", "bhs", first), **strides_of("second", "bhs", second),
        **strides_of("sums1", "bhs", first_lse), **strides_of("sums2", "bhs", second_lse),
    }  # fmt: skip
    with launching_on(out.device):
        grid = triton.cdiv(S, MERGE.rows), Hq, B
        merge_kernel[grid](**arguments, BLOCK_M=MERGE.rows, num_warps=MERGE.warps)
